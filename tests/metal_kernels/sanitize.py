"""Run the tests of GPU kernels under NVIDIA's compute-sanitizer, a share of them in each of several processes.

    python -m tests.metal_kernels.sanitize [--tools racecheck memcheck] [--processes 8] [FILE ...]     (make sanitize)

What each process printed goes to build/sanitize. Exit code 1 where a tool found something or a test failed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
FIRST_PORT, PORTS = 50_000, 10
TOOLS = ("racecheck", "memcheck", "initcheck", "synccheck")
ELSEWHERE = re.compile(r"(?:^|[^a-z])(?:metal|faults?|emulat\w*)(?:[^a-z]|$)")
"""Tests whose names say that they run no kernel on an NVIDIA GPU."""
SUMMARY = re.compile(r"SUMMARY: (\d+) (?:errors?|hazards?)")
ENDED = re.compile(r"(\d+) (passed|failed|errors?|skipped)\b(?=.* in [\d.]+s)")


@dataclass(frozen=True)
class Outcome:
    """What a process under a tool came to.

    code: its exit code; findings: of the tool, None where it said nothing of them; tests: how many ended how.
    """

    code: int
    findings: int | None
    tests: dict[str, int]

    def clean(self, tests: int) -> bool:
        """Whether so many tests ended, some of them passed, none failed, and nothing was found."""
        ended = sum(self.tests.values()) == tests and set(self.tests) <= {"passed", "skipped"}
        return self.code == 0 and self.findings == 0 and ended and self.tests.get("passed", 0) > 0

    def __str__(self) -> str:
        found = "findings unknown" if self.findings is None else f"{self.findings} found"
        said = ", ".join(f"{number} {kind}" for kind, number in self.tests.items()) or "no test ended"
        return f"{found}; {said}" + (f"; exit code {self.code}" if self.code else "")

    @staticmethod
    def of(code: int, text: str) -> "Outcome":
        """From an exit code and what was printed."""
        found = [int(number) for number in SUMMARY.findall(text)]
        ended = {kind: int(number) for number, kind in ENDED.findall(text)}
        return Outcome(code, sum(found) if found else None, ended)


def collected(files: Sequence[str]) -> list[str]:
    """The tests of these files that run kernels on an NVIDIA GPU, as pytest names them."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *files]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise SystemExit(finished.stdout[-2000:] + finished.stderr[-2000:])
    names = re.findall(r"^\S+\.py::.+$", finished.stdout, re.M)
    return [name for name in names if not ELSEWHERE.search(name.split("::", 1)[1])]


def run(tool: str, number: int, tests: Sequence[str], log: Path) -> Outcome:
    """These tests under a tool, in a process of their own, which the tool talks to by ports of its own.

    The tool looks at our kernels, not at MLX's.
    """
    command = ["compute-sanitizer", "--tool", tool, "--target-processes", "application-only"]
    command += ["--kernel-name", "kns=turboquant"]
    command += ["--port", str(FIRST_PORT + PORTS * number), "--max-connections", str(PORTS)]
    command += [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    with log.open("w") as file:
        finished = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
    return Outcome.of(finished.returncode, log.read_text(errors="replace"))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="*", default=[str(path) for path in sorted(HERE.glob("test_gpu_*.py"))])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=["racecheck", "memcheck"])
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--logs", type=Path, default=Path("build/sanitize"))
    args = parser.parse_args()
    if shutil.which("compute-sanitizer") is None:
        raise SystemExit("compute-sanitizer is not on PATH; it comes with NVIDIA's CUDA toolkit")
    tests, dirty = collected(args.files), 0
    if not tests:
        raise SystemExit(f"no test in {' '.join(args.files)} runs kernels on an NVIDIA GPU")
    args.logs.mkdir(parents=True, exist_ok=True)
    shares = [share for i in range(args.processes) if (share := tests[i :: args.processes])]
    jobs = [(tool, i, share) for tool in args.tools for i, share in enumerate(shares)]
    with ThreadPoolExecutor(args.processes) as pool:
        waiting = {
            pool.submit(run, tool, number, share, args.logs / f"{tool}-{i}.txt"): (tool, i, share)
            for number, (tool, i, share) in enumerate(jobs)
        }
        for done in as_completed(waiting):
            tool, i, share = waiting[done]
            dirty += not done.result().clean(len(share))
            print(f"{tool} {i}: {done.result()}", flush=True)
    print(f"{len(tests)} tests under {' and '.join(args.tools)}: " + (f"see {args.logs}" if dirty else "nothing found"))
    return int(dirty > 0)


if __name__ == "__main__":
    sys.exit(main())
