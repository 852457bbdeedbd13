"""The demonstration: a real client, a real server process, real stdio, all tools."""

import json
from pathlib import Path

import pytest

import tq_mcp.demo
from tq_mcp.cli import main
from tq_mcp.demo import Story


@pytest.fixture(autouse=True)
def _few_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tq_mcp.demo, "WINDOWS", 2)
    monkeypatch.setattr(tq_mcp.demo, "WINDOW_TOKENS", 64)
    monkeypatch.setattr(tq_mcp.demo, "NEW_TOKENS", 8)


def test_it_goes_the_whole_way_and_keeps_a_home_that_was_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--home", str(tmp_path / "kept"), "--json"]) == 0
    shown = capsys.readouterr()
    story = Story.model_validate(json.loads(shown.out))
    assert [row.method for row in story.evaluation.rows] == ["float", "affine", "turboquant"]
    assert story.conversion.bits == 3 and story.generation.generation_tokens == 8
    assert [model.name for model in story.models.models] == [story.conversion.name]
    assert (tmp_path / "kept" / "models" / story.conversion.name / "config.json").exists()
    steps = ["plan_conversion", "convert_model", "evaluate_ppl", "generate", "compare_kv_cache", "list_models"]
    positions = [shown.err.index(step) for step in steps]
    assert positions == sorted(positions)


def test_the_table_is_for_newcomers(demo_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--model", str(demo_model)]) == 0
    shown = capsys.readouterr().out
    for words in ("size of the model", "lower is better", "original", "MLX affine, 3 bits", "TurboQuant, 3 bits"):
        assert words in shown
    assert "temporary home" in shown


def test_a_tools_error_is_passed_on_in_its_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--model", "/nowhere/model"]) == 1
    assert "plan_conversion failed" in (words := capsys.readouterr().err) and "no model at" in words.lower()
