"""Running tests under compute-sanitizer, with a program in its place that says what it would."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.metal_kernels.sanitize import Outcome

ROOT = Path(__file__).resolve().parents[2]
TESTS = """
import warnings
warnings.warn("of::some kind")
def test_one(): pass
def test_two(): pass
def test_faults(): assert False
def test_three_metal(): assert False
"""
STANDS_IN = """#!/bin/sh
shift 10
"$@"
code=$?
echo "========= {summary}"
exit $code
"""


def sanitized(folder: Path, summary: str, tests: str = TESTS) -> subprocess.CompletedProcess[str]:
    (folder / "compute-sanitizer").write_text(STANDS_IN.format(summary=summary))
    (folder / "compute-sanitizer").chmod(0o755)
    (folder / "test_some.py").write_text(tests)
    command = [sys.executable, "-m", "tests.metal_kernels.sanitize", "--tools", "racecheck", "--processes", "2"]
    return subprocess.run(
        [*command, "--logs", "logs", "test_some.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
    )


def test_every_test_that_runs_on_the_gpu_is_looked_through(tmp_path: Path) -> None:
    finished = sanitized(tmp_path, "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.count("0 found; 1 passed") == 2
    assert finished.stdout.endswith("2 tests under racecheck: nothing found\n")


@pytest.mark.parametrize(
    ("summary", "tests"),
    [
        ("RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)", TESTS),
        ("nothing of what was found", TESTS),
        ("ERROR SUMMARY: 0 errors", "def test_one(): assert False\n"),
        ("ERROR SUMMARY: 0 errors", "import os\ndef test_one(): os.abort()\n"),
        ("ERROR SUMMARY: 0 errors", "import pytest\ndef test_one(): pytest.skip()\n"),
        ("ERROR SUMMARY: 0 errors", "def test_one_metal(): pass\n"),
    ],
)
def test_what_is_found_or_not_said_is_no_success(tmp_path: Path, summary: str, tests: str) -> None:
    assert sanitized(tmp_path, summary, tests).returncode == 1


def test_errors_of_several_summaries_add_up() -> None:
    text = "2 passed in 1.0s\n========= ERROR SUMMARY: 1 error\n========= ERROR SUMMARY: 2 errors\n"
    assert Outcome.of(0, text) == Outcome(0, 3, {"passed": 2})
