"""README's tables come from the benchmarks' JSON."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.render_readme import render

README = "before\n<!-- results:begin -->\nold\n<!-- results:end -->\nafter\n"


def row(method: str, ppl: float, **values: Any) -> dict[str, Any]:
    return {
        "method": method, "bits": 3, "group_size": 64, "bits_per_weight": 3.25, "size_bytes": 12_000_000,
        "ppl": ppl, "ppl_stderr": 0.5, "kl": 0.125, "top1": 0.75, "cost": ppl / 20 - 1, "paired_stderr": 0.2, **values,
    }  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> Path:
    report = {
        "model": "models/tiny", "text": {"name": "a.txt", "sha256": "0"}, "seq_len": 512, "num_samples": 8,
        "rows": [row("float", 20.0, bits=None, kl=None, top1=None), row("turboquant", 21.0),
                 row("turboquant", 22.0, scale="rms"), row("turboquant", 20.5, target_bpw=3.25)],
    }  # fmt: skip
    quality = {"machine": "a laptop", "command": "make bench", "report": report}
    (tmp_path / "quality.json").write_text(json.dumps(quality))
    return tmp_path


def test_a_row_holds_the_measured_numbers_and_the_cost(results: Path) -> None:
    text = render(README, results)
    assert "| **TurboQuant**, 3 bits | 3.25 | 12.0 | 21.00 ± 0.50 | +5.0% ± 1.0% | 0.1250 | 75.0% |" in text


def test_rows_of_one_method_are_told_apart(results: Path) -> None:
    text = render(README, results)
    assert "| codes with RMS scales, 3 bits | 3.25 | 12.0 | 22.00" in text
    assert "| **TurboQuant**, 3.25 bits shared out | 3.25 | 12.0 | 20.50" in text


def test_a_missing_measurement_is_left_empty(results: Path) -> None:
    assert "| as it came | 3.25 | 12.0 | 20.00 ± 0.50 |  |  |  |" in render(README, results)


def test_the_machine_and_the_command_stand_beside_the_numbers(results: Path) -> None:
    assert "a laptop; `make bench`." in render(README, results)


def test_text_around_the_markers_stays_and_rendering_again_changes_nothing(results: Path) -> None:
    text = render(README, results)
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert render(text, results) == text


def test_speeds_are_written_when_they_were_measured(results: Path) -> None:
    rows = [{"model": "tiny", "method": "turboquant", "bits": 3, "kernel_path": "cpu:matvec",
             "prompt_tokens_per_s": 1234.5, "prompt_times_affine": 25.25,
             "generation_tokens_per_s": 67.8, "generation_times_affine": 3.0}]  # fmt: skip
    speed = {"machine": "a laptop", "command": "c", "rows": rows}
    (results / "speed.json").write_text(json.dumps(speed))
    assert "| tiny, **TurboQuant**, 3 bits | 1,234 | 25.2 | 68 | 3.0 | `cpu:matvec` |" in render(README, results)


def test_without_results_the_readme_says_so(tmp_path: Path) -> None:
    assert "run `make bench`" in render(README, tmp_path)


def test_a_readme_without_markers_is_refused(results: Path) -> None:
    with pytest.raises(ValueError, match="results:begin"):
        render("no markers", results)
