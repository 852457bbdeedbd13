"""What goes into the registry comes out of it, under the names it was given."""

from collections.abc import Callable
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from registry import (
    CacheComparisonRecord,
    EvaluationRecord,
    Model,
    ModelRecord,
    Parent,
    Registry,
    RegistryError,
    SpeedRecord,
    open_registry,
    recipe_sha256,
)

Publish = Callable[..., Model]

FULL = {
    "source_repository": "org/tiny",
    "source_revision": "c0ffee",
    "source_size_bytes": 2**40,
    "quantized_parameters": 900,
    "licence": "apache-2.0",
    "group_size": 64,
    "seed": 2**40,
    "format_version": 2,
    "hardware": "2 cores",
    "seconds": 1.5,
    "peak_memory_bytes": 2**35,
    "parents": (Parent(name="org/tiny"), Parent(name="other", relation="merged")),
    "tags": ("fast", "small"),
    "created_at": datetime(2026, 1, 31, 12, tzinfo=timezone(timedelta(hours=2))),
}
SPEED = SpeedRecord(
    device="cpu",
    backend="cpu",
    kernel_path="cpu:matvec",
    prompt_tokens=9,
    generation_tokens=5,
    prompt_tokens_per_s=90.0,
    generation_tokens_per_s=30.0,
)
CACHE = CacheComparisonRecord(
    cache="k8v4", prompt_tokens=9, max_tokens=5, cache_bytes=100, compression=2.5, tokens_per_s=20.0, k_bits=8
)


def test_a_model_comes_back_with_every_field(
    registry: Registry, publish: Publish, record: Callable[..., ModelRecord]
) -> None:
    publish(**FULL)
    model, given = registry.get("tiny-tq3"), record(**FULL)
    for field in fields(ModelRecord):
        assert getattr(model, field.name) == getattr(given, field.name), field.name
    assert all(getattr(given, f.name) != f.default for f in fields(ModelRecord) if f.name != "method")
    assert model.created_at is not None
    assert model.created_at.tzinfo is UTC
    assert model.recipe_sha256 == recipe_sha256({"group_size": 64, "bits": 3})
    assert model.path == registry.models_root / "tiny-tq3"
    assert model.size_bytes == sum(path.stat().st_size for path in model.path.rglob("*") if path.is_file())


def test_equal_recipes_have_equal_hashes_and_odd_ones_are_refused() -> None:
    assert recipe_sha256({"a": 1, "b": [2]}) == recipe_sha256({"b": [2], "a": 1}) != recipe_sha256({"a": 1})
    with pytest.raises(RegistryError, match="cannot be written as JSON"):
        recipe_sha256({"bits": float("nan")})


def test_a_registry_is_remembered_and_its_home_may_move(home: Path, publish: Publish, tmp_path: Path) -> None:
    publish()
    home.rename(tmp_path / "moved")
    with open_registry(tmp_path / "moved") as registry:
        assert registry.get("tiny-tq3").path == tmp_path / "moved" / "models" / "tiny-tq3"
        assert registry.verify("tiny-tq3").ok


def test_names_are_found_in_any_case_and_the_nearest_are_named(registry: Registry, publish: Publish) -> None:
    publish("Tiny-TQ3")
    registry.set_alias("best", "tiny-tq3")
    assert registry.get("tiny-tq3").name == registry.get("BEST").name == "Tiny-TQ3"
    assert registry.find("nothing") is None
    found = registry.find("best")
    assert found is not None
    assert found.aliases == ("best",)
    with pytest.raises(RegistryError, match=r"no model 'tiny-tq4'.*Nearest: Tiny-TQ3"):
        registry.get("tiny-tq4")
    with pytest.raises(RegistryError, match=r"no model 'bes'.*Nearest: best"):
        registry.evaluations("bes")


def test_an_alias_moves_and_goes_but_never_hides_a_model(registry: Registry, publish: Publish) -> None:
    publish("a1")
    publish("b2")
    registry.set_alias("best", "a1")
    registry.set_alias("Best", "b2")
    assert registry.get("best").name == "b2"
    with pytest.raises(RegistryError, match="already the name of the model 'a1'"):
        registry.set_alias("a1", "b2")
    with pytest.raises(RegistryError, match="taken by the alias 'Best'"):
        registry.require_free("BEST")
    with pytest.raises(RegistryError, match="is not an alias"):
        registry.set_alias("../x", "b2")
    registry.remove_alias("best")
    assert registry.find("best") is None
    with pytest.raises(RegistryError, match="no alias 'best'"):
        registry.remove_alias("best")


def test_tags_are_put_on_once_and_taken_off(registry: Registry, publish: Publish) -> None:
    publish(tags=("old",))
    registry.add_tags("tiny-tq3", "new", "old", "new")
    assert registry.get("tiny-tq3").tags == ("new", "old")
    registry.remove_tags("tiny-tq3", "old", "never")
    assert registry.get("tiny-tq3").tags == ("new",)
    with pytest.raises(RegistryError, match="not a tag"):
        registry.add_tags("tiny-tq3", "two words")


def test_evaluations_come_back_oldest_first_and_the_latest_of_the_model_itself_stands_for_it(
    registry: Registry, publish: Publish, evaluation: Callable[..., EvaluationRecord]
) -> None:
    publish()
    first = evaluation(21.0, kl=0.1, top1=0.9, ppl_stderr=0.2, reference="float", backend="cpu")
    baseline = evaluation(20.0, method="float", baseline=True)
    registry.add_evaluation("tiny-tq3", first, baseline)
    stored = registry.evaluations("tiny-tq3")
    assert [replace(record, created_at=None) for record in stored] == [first, baseline]
    assert all(record.created_at is not None for record in stored)
    own = registry.get("tiny-tq3").evaluation
    assert own is not None
    assert own.ppl == 21.0


def test_evaluations_given_together_are_added_all_or_none(
    registry: Registry, publish: Publish, evaluation: Callable[..., EvaluationRecord]
) -> None:
    publish()
    with pytest.raises(RegistryError, match="ppl is inf; only finite"):
        registry.add_evaluation("tiny-tq3", evaluation(20.0), evaluation(float("inf")))
    with pytest.raises(RegistryError, match="no time zone"):
        registry.add_evaluation("tiny-tq3", evaluation(20.0, created_at=datetime(2026, 1, 1)))  # noqa: DTZ001, RUF100
    assert registry.evaluations("tiny-tq3") == ()


def test_speeds_and_cache_comparisons_come_back(registry: Registry, publish: Publish) -> None:
    publish()
    registry.add_speed("tiny-tq3", SPEED)
    registry.add_cache_comparison("tiny-tq3", replace(CACHE, cache="full"), CACHE)
    registry.add_cache_comparison("tiny-tq3", replace(CACHE, tokens_per_s=None))
    assert [replace(speed, created_at=None) for speed in registry.speeds("tiny-tq3")] == [SPEED]
    speed = registry.get("tiny-tq3").speed
    assert speed is not None
    assert speed.generation_tokens_per_s == 30.0
    registry.add_speed("tiny-tq3", replace(SPEED, generation_tokens_per_s=None))
    assert registry.speeds("tiny-tq3")[1].generation_tokens_per_s is None
    assert registry.get("tiny-tq3").speed == speed, "what was not measured replaced what was"
    caches = registry.cache_comparisons("tiny-tq3")
    assert [replace(cache, created_at=None, run="") for cache in caches][1:] == [
        CACHE,
        replace(CACHE, tokens_per_s=None),
    ]
    assert caches[0].run == caches[1].run != caches[2].run


def test_results_need_a_model(registry: Registry) -> None:
    with pytest.raises(RegistryError, match="no model 'none'"):
        registry.add_speed("none", SPEED)


def test_lineage_finds_children_and_outlives_the_parent(registry: Registry, publish: Publish) -> None:
    publish("parent")
    publish("child", parents=(Parent(name="Parent", relation="quantized"),))
    assert registry.children("parent") == ("child",)
    registry.remove("parent")
    assert registry.get("child").parents == (Parent(name="Parent", relation="quantized"),)


def test_a_backup_is_a_whole_registry_of_its_own(registry: Registry, publish: Publish, tmp_path: Path) -> None:
    publish()
    assert registry.backup().parent == registry.home / "backups"
    target = registry.backup(tmp_path / "copies" / "one.sqlite")
    with open_registry(registry.home, f"sqlite:///{target}") as copy:
        assert copy.get("tiny-tq3").files == registry.get("tiny-tq3").files
    with pytest.raises(RegistryError, match="exists already"):
        registry.backup(target)
    with pytest.raises(RegistryError, match="failed"):
        registry.backup(target / "below-a-file.sqlite")
