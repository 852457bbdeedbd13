"""What every benchmark needs: timing side by side, the machine's description, a table and a JSON file."""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

RESULTS = Path(__file__).resolve().parent / "results"
SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


def median_seconds(run: Callable[[], object], repeats: int = 15, warm_up: int = 2) -> float:
    """The median time of `run` over `repeats` calls after `warm_up` uncounted ones."""
    times: list[float] = []
    for i in range(warm_up + repeats):
        began = time.perf_counter()
        run()
        if i >= warm_up:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def machine() -> str:
    """Processor, cores and versions in one line."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        name = names[0] if names else name
    device = "" if mx.default_device() == mx.Device(mx.cpu) else f", {mx.device_info().get('device_name', 'GPU')}"
    return f"{name}, {os.cpu_count()} cores{device}; MLX {version('mlx')}, mlx-lm {version('mlx-lm')}"


def report(name: str, command: str, rows: list[dict[str, Any]], **more: Any) -> None:
    """Print rows as a table and write them to RESULTS/name.json with the machine and the command."""
    print(f"\n{name}: {machine()}")
    columns = list(rows[0])
    cells = [[_cell(row[c]) for c in columns] for row in rows]
    widths = [max(len(c), *(len(line[i]) for line in cells)) for i, c in enumerate(columns)]
    for line in [columns, *cells]:
        print("  " + "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))
    RESULTS.mkdir(exist_ok=True)
    payload = {"machine": machine(), "command": command, "rows": rows, **more}
    (RESULTS / f"{name}.json").write_text(json.dumps(payload, indent=1) + "\n")
    sys.stdout.flush()


def _cell(value: Any) -> str:
    return (
        f"{value:,.3g}"
        if isinstance(value, float) and abs(value) < 1000
        else (f"{value:,.0f}" if isinstance(value, float) else str(value))
    )
