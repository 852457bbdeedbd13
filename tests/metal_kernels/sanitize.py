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
ELSEWHERE = re.compile(r"metal|fault|emulat")
"""Tests whose names say that they run no kernel on an NVIDIA GPU."""
SUMMARY = re.compile(r"SUMMARY: (\d+) (?:errors?|hazards?)")
ENDED = re.compile(r"(\d+) (passed|failed|errors?|skipped)\b(?=.* in [\d.]+s)")


@dataclass(frozen=True)
class Outcome:
    """What one process under a tool said: findings of the tool, or None where it said nothing of them, and tests by
    how they ended."""

    findings: int | None
    tests: dict[str, int]

    @property
    def clean(self) -> bool:
        return self.findings == 0 and not {"failed", "error", "errors"} & set(self.tests)

    @staticmethod
    def of(text: str) -> "Outcome":
        """From what was printed."""
        found = [int(number) for number in SUMMARY.findall(text)]
        return Outcome(sum(found) if found else None, {kind: int(number) for number, kind in ENDED.findall(text)})


def collected(files: Sequence[str]) -> list[str]:
    """The tests of these files that run kernels on an NVIDIA GPU, as pytest names them."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *files]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise SystemExit(finished.stdout[-2000:] + finished.stderr[-2000:])
    names = [line for line in finished.stdout.splitlines() if "::" in line]
    return [name for name in names if not ELSEWHERE.search(name.split("::", 1)[1])]


def run(tool: str, number: int, tests: Sequence[str], log: Path) -> Outcome:
    """These tests under a tool, in a process of their own, which the tool talks to by ports of its own."""
    command = ["compute-sanitizer", "--tool", tool, "--target-processes", "application-only"]
    command += ["--port", str(FIRST_PORT + PORTS * number), "--max-connections", str(PORTS)]
    command += [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    with log.open("w") as file:
        subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
    return Outcome.of(log.read_text(errors="replace"))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="*", default=[str(path) for path in sorted(HERE.glob("test_gpu_*.py"))])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=["racecheck", "memcheck"])
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--logs", type=Path, default=Path("build/sanitize"))
    args = parser.parse_args()
    if shutil.which("compute-sanitizer") is None:
        raise SystemExit("compute-sanitizer is not on PATH; it comes with NVIDIA's CUDA toolkit")
    tests, ended = collected(args.files), list[Outcome]()
    args.logs.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.processes) as pool:
        waiting = {
            pool.submit(run, tool, i + j * args.processes, share, args.logs / f"{tool}-{i}.txt"): f"{tool} {i}"
            for j, tool in enumerate(args.tools)
            for i in range(args.processes)
            if (share := tests[i :: args.processes])
        }
        for done in as_completed(waiting):
            ended.append(outcome := done.result())
            said = ", ".join(f"{number} {kind}" for kind, number in outcome.tests.items()) or "no test ended"
            print(f"{waiting[done]}: {outcome.findings} found; {said}", flush=True)
    dirty = sum(not outcome.clean for outcome in ended)
    print(f"{len(tests)} tests under {' and '.join(args.tools)}: " + (f"see {args.logs}" if dirty else "nothing found"))
    return int(dirty > 0)


if __name__ == "__main__":
    sys.exit(main())
