"""Filters, sort orders and pages."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from registry import (
    FILTER_FIELDS,
    SORT_FIELDS,
    EvaluationRecord,
    Model,
    ModelRecord,
    Registry,
    RegistryError,
    filter_help,
    open_registry,
)
from registry import SpeedRecord as Speed

FIVE = [
    ("llama-4", 4, "llama", 20.0),
    ("llama-3", 3, "llama", 22.5),
    ("qwen-3", 3, "qwen2", 21.0),
    ("qwen-2", 2, "qwen2", None),
    ("plain", None, "mistral", None),
]


@pytest.fixture(scope="module")
def five_home(
    tmp_path_factory: pytest.TempPathFactory,
    record: Callable[..., ModelRecord],
    fill: Callable[..., Path],
    evaluation: Callable[..., EvaluationRecord],
) -> Path:
    home = tmp_path_factory.mktemp("five") / "home"
    with open_registry(home) as registry:
        for day, (name, bits, architecture, ppl) in enumerate(FIVE, start=1):
            changes = {
                "licence": "mit" if bits == 4 else None,
                "created_at": datetime(2026, 11, day, 12, tzinfo=UTC),
                "hardware": "100%_",
            }
            with registry.staging(name) as staging:
                made = record(name, bits=bits, architecture=architecture, **changes)
                registry.publish(made, fill(staging))
            if ppl:
                results = evaluation(99.0), evaluation(ppl), evaluation(1.0, baseline=True)
                registry.add_evaluation(name, *results)
        registry.add_tags("qwen-2", "small")
    return home


@pytest.fixture
def five(five_home: Path, home: Path) -> Iterator[Registry]:
    """Five models, of which three were evaluated."""
    shutil.copytree(five_home, home)
    with open_registry(home) as opened:
        yield opened


def names(registry: Registry, *filters: str, sort: str = "created_at") -> list[str]:
    return [model.name for model in registry.models(filters, sort=sort).models]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ([], ["llama-4", "llama-3", "qwen-3", "qwen-2", "plain"]),
        (["bits<=3"], ["llama-3", "qwen-3", "qwen-2"]),
        (["bits < 3"], ["qwen-2"]),
        (["bits>3"], ["llama-4"]),
        (["bits>=2.5", "architecture=qwen2"], ["qwen-3"]),
        (["bits!=3"], ["llama-4", "qwen-2", "plain"]),
        (["architecture=llama"], ["llama-4", "llama-3"]),
        (["name~LLAMA"], ["llama-4", "llama-3"]),
        (["name~%"], []),
        (["hardware~0%_"], ["llama-4", "llama-3", "qwen-3", "qwen-2", "plain"]),
        (["licence!=mit"], ["llama-3", "qwen-3", "qwen-2", "plain"]),
        (["ppl<=21"], ["llama-4", "qwen-3"]),
        (["tag=small"], ["qwen-2"]),
        (["tag!=small", "bits=2"], []),
        (["created_at>=2026-11-04"], ["qwen-2", "plain"]),
        (["created_at<2026-11-01T13:00:00+02:00"], []),
        (["created_at=2026-11-01T14:00:00+02:00"], ["llama-4"]),
        (["external=false", "bits=4"], ["llama-4"]),
        (["external=TRUE"], []),
        (["bits_per_weight<3.25e0"], []),
        (["name=x' OR '1'='1"], []),
    ],
)
def test_filters_keep_what_they_say(five: Registry, filters: list[str], expected: list[str]) -> None:
    assert names(five, *filters) == expected
    assert five.models(filters).total == len(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bits", "not a filter"),
        ("", "not a filter"),
        ("bits<=", "not a filter"),
        ("1=1; DROP TABLE models", "no filter field '1'"),
        ("bit<=3", "Nearest: bits"),
        ("name_key=x", "no filter field"),
        ("bits~3", "does not go with bits"),
        ("name<b", "does not go with name"),
        ("tag~s", "does not go with tag"),
        ("bits<=three", "give a number"),
        ("bits<=nan", "give a number"),
        ("bits<=1_0", "give a number"),
        ("bits==3", "give a number"),
        ("created_at>yesterday", "give a date"),
        ("created_at>=0001-01-01T00:00:00+14:00", "give a date"),
        ("created_at<9999-12-31T23:59:59-14:00", "give a date"),
        ("external=maybe", "give true or false"),
    ],
)
def test_bad_filters_are_refused_in_clear_words(registry: Registry, text: str, message: str) -> None:
    with pytest.raises(RegistryError, match=message):
        registry.models([text])


def test_sorting_puts_missing_values_last_in_both_directions(five: Registry) -> None:
    assert names(five, sort="ppl") == ["llama-4", "qwen-3", "llama-3", "qwen-2", "plain"]
    assert names(five, sort="-ppl") == ["llama-3", "qwen-3", "llama-4", "qwen-2", "plain"]
    assert names(five, sort="-bits")[-1] == "plain"
    assert five.models().models[0].name == "plain"
    with pytest.raises(RegistryError, match="no sort field 'tag'"):
        five.models(sort="tag")


@pytest.mark.parametrize("sort", ["ppl", "-ppl", "-created_at", "created_at", "bits", "-bits", "architecture"])
@pytest.mark.parametrize("limit", [1, 2])
def test_pages_give_every_model_once_in_order(five: Registry, sort: str, limit: int) -> None:
    whole = names(five, sort=sort)
    found: list[str] = []
    cursor = None
    while True:
        page = five.models(sort=sort, limit=limit, cursor=cursor)
        assert len(page.models) <= limit
        assert page.total == 5
        found += [model.name for model in page.models]
        cursor = page.next_cursor
        if cursor is None:
            break
    assert found == whole


def test_a_cursor_stays_in_place_when_a_model_is_removed(five: Registry) -> None:
    page = five.models(sort="name", limit=2)
    five.remove(page.models[0].name)
    assert [m.name for m in five.models(sort="name", cursor=page.next_cursor).models] == names(five, sort="name")[1:]


def test_cursors_of_another_listing_and_bad_limits_are_refused(five: Registry) -> None:
    cursor = five.models(sort="ppl", limit=2).next_cursor
    for sort, bad in (
        ("-ppl", cursor),
        ("ppl", "?"),
        ("ppl", "bm9uc2Vuc2U="),
        ("ppl", "W10="),
        ("created_at", "W10="),
    ):
        with pytest.raises(RegistryError, match="cursor does not belong"):
            five.models(sort=sort, cursor=bad)
    with pytest.raises(RegistryError, match="cursor does not belong"):
        five.models(["bits=3"], sort="ppl", cursor=cursor)
    for limit in (0, 501):
        with pytest.raises(RegistryError, match="1 to 500"):
            five.models(limit=limit)


def test_ranking_numbers_not_measured_alike_is_noticed(
    five: Registry, evaluation: Callable[..., EvaluationRecord]
) -> None:
    assert five.models(sort="ppl").notices == ()
    five.add_evaluation("qwen-2", evaluation(30.0, seq_len=512))
    assert five.models(sort="ppl").notices == ("Not measured alike: seq_len is 128, 512.",)
    assert five.models(sort="bits").notices == ()


def test_models_can_be_sorted_by_their_latest_speed(five: Registry) -> None:
    speed = Speed(
        device="cpu", backend="cpu", kernel_path="", prompt_tokens=1, generation_tokens=1,
        prompt_tokens_per_s=1.0, generation_tokens_per_s=5.0,
    )  # fmt: skip
    five.add_speed("qwen-2", speed)
    assert names(five, sort="-generation_tokens_per_s")[0] == "qwen-2"
    assert names(five, "generation_tokens_per_s>=5") == ["qwen-2"]
    five.add_speed("qwen-2", replace(speed, generation_tokens_per_s=None, prompt_tokens_per_s=2.0))
    assert names(five, "generation_tokens_per_s>=5") == names(five, "prompt_tokens_per_s=2") == ["qwen-2"]
    assert names(five, sort="-generation_tokens_per_s")[0] == "qwen-2"


def test_the_help_names_every_field() -> None:
    text = filter_help()
    assert all(name in text for name in FILTER_FIELDS)
    assert set(FILTER_FIELDS) - set(SORT_FIELDS) == {"tag"}


def test_external_models_are_found(registry: Registry, publish: Callable[..., Model], tmp_path: Path) -> None:
    publish("inside")
    publish("outside", final=tmp_path / "outside")
    assert names(registry, "external=true") == ["outside"]
