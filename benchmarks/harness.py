"""What every benchmark needs: timing side by side, the machine's description, a table and a JSON file."""

import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import mlx.core as mx

import metal_kernels

RESULTS = Path(__file__).resolve().parent / "results"
SHARED = Path(__file__).resolve().parent.parent.parent / "shared"
ROUND_SECONDS, MOST_CALLS, ROUND, COUNTED = 16e-3, 1600, 5, 100_000
STEPS = 50
"""Calls in a run of those that wait for each other."""


def prompt_of(tokens: int) -> list[int]:
    """Token ids without meaning, none of them special, for models of random weights."""
    return [101 + (7919 * i) % 4000 for i in range(tokens)]


def on_gpu() -> bool:
    """Whether MLX computes on a GPU here."""
    return mx.default_device() != mx.Device(mx.cpu)


Run = Callable[[int], mx.array]
"""A call to be timed, which gets its number."""
Step = Callable[[mx.array, int], mx.array]
"""A call that makes of an array, and its number, what takes the array's place."""


def microseconds(runs: Sequence[Run], calls: int = 20, turns: int = 8) -> list[float]:
    """Median microseconds of one call of each of `runs`, on a GPU of half the `turns`, a round of calls in each.

    They take turns, a round of each at a time, so that a machine whose speed drifts is the same for all; each round
    has another, uncounted, before it: what follows other calls is slower. On a GPU a round is one graph, built before
    the clock starts, of as many calls as take ROUND_SECONDS, or MOST_CALLS, so that launches go on while kernels run,
    as they do in a model, but for the last hundred: what counts is the GPU's time or that of launching, whichever is
    longer; all rounds of a turn on the `fastest_core`. Of the turns those count in which a small kernel of MLX's own
    was launched fastest, since on a shared machine launching takes twice as long for seconds. On a CPU a round is one
    of `calls`, ROUND of them in a turn, and all count.
    """
    if not on_gpu():
        rounds = [[_round(run, ROUND) for run in runs] for _ in range(-(-calls // ROUND))]
    else:
        counts = [_calls(run, calls) for run in runs]
        taken = sorted((_turn(runs, counts) for _ in range(turns)), key=lambda turn: turn[0])
        rounds = [each for _, each in taken[: -(-turns // 2)]]
    return [1e6 * statistics.median(chain.from_iterable(mine)) for mine in zip(*rounds, strict=True)]


def _turn(runs: Sequence[Run], counts: Sequence[int]) -> tuple[float, list[list[float]]]:
    """A round of each of `runs` on a GPU, after how many seconds launching takes meanwhile."""
    with fastest_core():
        before = _graph(_launch, MOST_CALLS)
        rounds = [_round(run, count) for run, count in zip(runs, counts, strict=True)]
        return max(before, _graph(_launch, MOST_CALLS)), rounds


def _launch(_: int) -> mx.array:
    return mx.arange(8)


@contextmanager
def fastest_core() -> Iterator[None]:
    """Keeps this thread on the processor core that runs fastest just now, where the system allows that.

    Of a shared machine's cores some take twice as long as others, and others a second later: what launches kernels
    does too.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(cores, key=_seconds_on)})
        yield
    finally:
        os.sched_setaffinity(0, cores)


def _seconds_on(core: int) -> float:
    """Of counting on one core, where this thread stays."""
    os.sched_setaffinity(0, {core})
    began = time.perf_counter()
    sum(range(COUNTED))
    return time.perf_counter() - began


def microseconds_in_turn(steps: Sequence[Step], x: mx.array, calls: int = 20) -> list[float]:
    """Median microseconds of one call of each of `steps`; on a GPU each takes the result of the one before, from x on.

    So a model's calls wait for each other. Calls that do not, run side by side, and one that leaves most of a GPU idle
    looks fast. On a CPU each call is of x.
    """
    if not on_gpu():
        return microseconds([partial(step, x) for step in steps], calls)
    return [us / STEPS for us in microseconds([_in_turn(step, x) for step in steps], calls=1)]


def _in_turn(step: Step, x: mx.array) -> Run:
    """STEPS calls; the runs of one graph, numbered from 0, wait for each other too."""
    latest = x

    def run(number: int) -> mx.array:
        nonlocal latest
        latest = latest if number else x
        for i in range(number * STEPS, (number + 1) * STEPS):
            latest = step(latest, i)
        return latest

    return run


def beginning(y: mx.array, shape: tuple[int, ...]) -> mx.array:
    """As many of y's first values as an array of this shape has, without a copy."""
    return y.reshape(-1)[: math.prod(shape)].reshape(shape)


def path_of(step: Step, x: mx.array) -> str:
    """The path of the kernels that a call takes."""
    metal_kernels.reset_paths()
    mx.eval(step(x, 0))
    return metal_kernels.kernel_path()


def _calls(run: Run, least: int) -> int:
    _graph(run, least)
    return min(MOST_CALLS, max(least, round(ROUND_SECONDS / _graph(run, least))))


def _round(run: Run, calls: int) -> list[float]:
    """Seconds of a call, of a graph of them on a GPU or of each by itself on a CPU, after uncounted ones."""
    if on_gpu():
        _graph(run, calls)
        return [_graph(run, calls)]
    return [_call(run, i) for i in range(calls + 1)][1:]


def _graph(run: Run, calls: int) -> float:
    results = [run(i) for i in range(calls)]
    mx.synchronize()
    began = time.perf_counter()
    mx.eval(results)
    mx.synchronize()
    return (time.perf_counter() - began) / calls


def _call(run: Run, number: int) -> float:
    began = time.perf_counter()
    mx.eval(run(number))
    return time.perf_counter() - began


def copies_of(nbytes: int) -> int:
    """How many weights of `nbytes` bytes, taken in turn, are several times a processor's cache: 4 to 64."""
    return min(64, max(4, -(-(300 if on_gpu() else 128) * 10**6 // nbytes)))


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of MLX's own addition of a number to a large array."""
    array = mx.ones((1 << 27 if on_gpu() else 1 << 24,), mx.float32)
    mx.eval(array)
    return 2e6 * array.nbytes / microseconds([lambda i: array + i], 8)[0]


def machine() -> str:
    """Processor, cores and versions in one line."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        name = names[0] if names else name
    device = "" if mx.default_device() == mx.Device(mx.cpu) else f", {mx.device_info().get('device_name', 'GPU')}"
    return f"{name}, {os.cpu_count()} cores{device}; MLX {version('mlx')}, mlx-lm {version('mlx-lm')}"


def command_of(name: str, **options: Any) -> str:
    """A benchmark's command line with these options."""
    texts = [f"python -m benchmarks.{name}"]
    for option, value in options.items():
        texts += [f"--{option.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return " ".join(texts)


def report(name: str, command: str, rows: list[dict[str, Any]], **more: Any) -> None:
    """Print rows as a table and write them to RESULTS: see `save`."""
    print(f"\n{name}: {machine()}")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [[_cell(row.get(c)) for c in columns] for row in rows]
    widths = [max(len(c), *(len(line[i]) for line in cells)) for i, c in enumerate(columns)]
    for line in [columns, *cells]:
        print("  " + "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))
    sys.stdout.flush()
    save(name, command, rows, **more)


def save(name: str, command: str, rows: list[dict[str, Any]], **more: Any) -> None:
    """Write rows to RESULTS with the machine and the command, see `result_file`; also those of a run that goes on."""
    RESULTS.mkdir(exist_ok=True)
    payload = {"machine": machine(), "command": command, "rows": rows, **more}
    result_file(name).write_text(json.dumps(payload, indent=1) + "\n")


def result_file(name: str) -> Path:
    """Where a benchmark's rows go: name.json of a CPU, name-cuda.json or name-metal.json of a GPU."""
    return RESULTS / (f"{name}-{metal_kernels.device()}.json" if on_gpu() else f"{name}.json")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return (
        f"{value:,.3g}"
        if isinstance(value, float) and abs(value) < 1000
        else (f"{value:,.0f}" if isinstance(value, float) else str(value))
    )
