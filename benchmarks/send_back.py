"""Run the tests and every benchmark on this machine and write one JSON file to send back.

    python -m benchmarks.send_back [FILE]     (make report)

What fails is in the file with what it printed, and does not stop the rest. No text, path or name of yours is in it
but the machine's model and the versions of MLX and mlx-lm.
"""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import metal_kernels
from benchmarks.harness import machine, result_file

BENCHMARKS = ("distortion", "matvec", "matmul", "experts", "attention", "end_to_end", "convert")
RESULT_OF = {"end_to_end": "speed"}
LAST = 60
"""Lines of a failure's output that are kept."""


def run(*arguments: str) -> tuple[int, str, float]:
    """Exit code, the last lines printed, and seconds of a Python module."""
    began = time.perf_counter()
    finished = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, check=False)
    lines = re.split(r"[\r\n]+", finished.stdout + finished.stderr)
    return finished.returncode, "\n".join(lines[-LAST:]).replace(str(Path.home()), "~"), time.perf_counter() - began


def measured(name: str) -> dict[str, Any]:
    """A benchmark's rows, or what it printed before it failed."""
    code, output, seconds = run(f"benchmarks.{name}")
    path = result_file(RESULT_OF.get(name, name))
    if code or not path.exists():
        return {"failed": code, "output": output, "seconds": seconds}
    return json.loads(path.read_text()) | {"seconds": seconds}


def main() -> None:
    target = Path(sys.argv[1] if len(sys.argv) > 1 else f"tq-mcp-{metal_kernels.device()}.json")
    print(f"Tests first, then {len(BENCHMARKS)} benchmarks on {machine()}: about 20 minutes.", flush=True)
    code, output, seconds = run("pytest", "-q", "-n", "auto", "tests")
    print(f"tests: {output.strip().splitlines()[-1]}", flush=True)
    result: dict[str, Any] = {"machine": machine(), "tests": {"exit": code, "output": output, "seconds": seconds}}
    for name in BENCHMARKS:
        result[name] = measured(name)
        print(f"{name}: {'failed' if 'failed' in result[name] else 'measured'}", flush=True)
        target.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{target} is written. Please attach it to a new issue of the project.")


if __name__ == "__main__":
    main()
