"""Killed before any change that it makes, a registry is found either as it was or as it was to be."""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

LAB = Path(__file__).with_name("crash_lab.py")
ROOT = LAB.parents[2]

BOTH = ["old", "outside"]
WITH_NEW = ["new", "old", "outside"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Any]]]:
    """Outcomes of a scenario, run once."""
    return cache(lambda scenario: run_lab(scenario, tmp_path_factory.mktemp(scenario)))


def run_lab(scenario: str, folder: Path) -> list[dict[str, Any]]:
    path = f"import sys, runpy; sys.path.insert(0, {str(ROOT)!r}); sys.argv[1:] = {[scenario, str(folder)]!r}; "
    command = [sys.executable, "-c", f"{path}runpy.run_path({str(LAB)!r}, run_name='__main__')"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert finished.returncode == 0, finished.stderr
    return [json.loads(line) for line in finished.stdout.splitlines()]


@pytest.mark.parametrize(
    ("scenario", "before", "after", "kills"),
    [
        ("publish", BOTH, WITH_NEW, 14),
        ("publish-elsewhere", BOTH, WITH_NEW, 16),
        ("remove", BOTH, ["outside"], 8),
        ("remove-elsewhere", BOTH, ["old"], 8),
        ("recover-publish", WITH_NEW, WITH_NEW, 5),
        ("recover-remove", ["outside"], ["outside"], 5),
        ("first-open", [], [], 5),
    ],
)
def test_records_and_folders_appear_and_disappear_together(
    scenario: str, before: list[str], after: list[str], kills: int, lab: Callable[[str], list[dict[str, Any]]]
) -> None:
    found = lab(scenario)
    assert len(found) > kills, "the lab killed it in fewer places than there are"
    for outcome in found:
        assert outcome["models"] in (before, after), outcome
        assert outcome["folders"] == outcome["models"], outcome
        assert outcome["whole"], outcome
        if scenario.startswith("publish") and outcome["models"] == before:
            assert len(outcome["staged"]) <= 2, outcome  # unfinished work, kept for `again`
        else:
            assert outcome["staged"] == [], outcome
        assert outcome["left"] == [], outcome
    assert found[-1]["before"] == "end"
    assert found[-1]["models"] == after


def test_what_a_kill_undid_can_be_done_again_and_what_it_did_not_undo_cannot(
    lab: Callable[[str], list[dict[str, Any]]],
) -> None:
    for outcome in lab("publish"):
        if outcome["models"] == BOTH:
            assert outcome["again"] == "done"
        else:
            assert "'new' is taken" in outcome["again"]


def test_a_finished_publish_is_not_thrown_away_by_a_kill(
    lab: Callable[[str], list[dict[str, Any]]],
) -> None:
    found = lab("publish")
    renames = [outcome for outcome in found if outcome["before"].startswith("os.rename")]
    assert [(outcome["recovered"], outcome["models"]) for outcome in renames] == [(["published"], WITH_NEW)]
