"""The demonstration: a real client, a real server process, real stdio, all tools."""

import io
from pathlib import Path
from typing import Any

import anyio
import pytest
from mcp import Client
from rich.console import Console

import tq_mcp.cli.demo
import tq_mcp.demo
from tq_mcp.cli import main
from tq_mcp.cli.demo import table
from tq_mcp.demo import Demo, DemoError, Story, run_demo
from tq_mcp.schemas import ModelDetails
from tq_mcp.server import build_server
from tq_mcp.settings import Settings

STEPS = ["plan_conversion", "convert_model", "evaluate_ppl", "generate", "compare_kv_cache", "list_models"]


def ignore(what: str, part: float | None) -> None:
    """Nobody watches."""


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def told() -> list[str]:
    """What the demo said it was doing."""
    return []


@pytest.fixture(scope="module")
def story(kept: Path, told: list[str]) -> Story:
    """The demo, played once with little text."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"WINDOWS": 2, "WINDOW_TOKENS": 64, "NEW_TOKENS": 8}.items():
            patch.setattr(tq_mcp.demo, name, value)
        return anyio.run(run_demo, None, kept, lambda what, part: told.append(what))


def test_it_goes_the_whole_way(story: Story) -> None:
    assert [row.method for row in story.evaluation.rows] == ["float", "affine", "turboquant"]
    assert story.plan.rows[1].size_bytes == story.conversion.size_bytes
    assert story.conversion.bits == 3 and story.generation.generation_tokens == 8
    assert story.caches.rows[0].k_bits is None and len(story.caches.rows) > 1
    (model,) = story.models.models
    assert model.name == story.conversion.name and model.ppl == story.evaluation.rows[2].ppl


def test_a_home_that_was_given_is_kept(story: Story, kept: Path) -> None:
    assert (kept / "models" / story.conversion.name / "config.json").exists()


def test_it_tells_each_step_in_order(story: Story, told: list[str]) -> None:
    steps = list(dict.fromkeys(what.partition(":")[0] for what in told))
    assert steps == ["starting the server", *STEPS]


def test_the_table_is_for_newcomers(story: Story) -> None:
    page = io.StringIO()
    Console(file=page, width=140).print(table(story, 12.0, None))
    for words in ("size of the model", "lower is better", "original", "MLX affine, 3 bits", "TurboQuant, 3 bits"):
        assert words in page.getvalue()
    assert "temporary home" in page.getvalue() and "times smaller" in page.getvalue()


def test_a_tools_error_is_told_in_its_own_words(home: Path) -> None:
    async def ask() -> None:
        async with Client(build_server(Settings(home))) as client:
            with pytest.raises(DemoError, match=r"get_model failed.*no model 'nothing'"):
                await Demo(client, ignore).call(ModelDetails, "get_model", name="nothing")

    anyio.run(ask)


class TestTheCommand:
    def test_it_prints_the_story_as_json(
        self, story: Story, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        async def play(model: str | None, home: Path | None, tell: Any) -> Story:
            assert (model, home) == ("owner/name", tmp_path)
            tell("convert_model: layer 1", 0.5)
            return story

        monkeypatch.setattr(tq_mcp.cli.demo, "run_demo", play)
        assert main(["demo", "--model", "owner/name", "--home", str(tmp_path), "--json"]) == 0
        shown = capsys.readouterr()
        assert Story.model_validate_json(shown.out) == story
        assert "convert_model" in shown.err

    def test_it_fails_in_the_words_of_the_tool(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        async def fail(*_: Any) -> Story:
            raise DemoError("plan_conversion failed. No model at x.")

        monkeypatch.setattr(tq_mcp.cli.demo, "run_demo", fail)
        assert main(["demo"]) == 1
        assert capsys.readouterr().err.endswith("tq-mcp: plan_conversion failed. No model at x.\n")
