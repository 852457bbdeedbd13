"""Converting a checkpoint from disk to disk, with searched scales, beside mlx-lm's own affine conversion, in one run.

    python -m benchmarks.convert [--layers 8] [--file-mb 1000] [--bits 4 3 2]

The checkpoint is a Llama with random bfloat16 weights, 90 MB a layer, in files as published ones are; by default 8
layers on a CPU, 64 on a GPU. The first conversion at each width, which compiles, is counted apart.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_lm

import metal_kernels
from benchmarks.end_to_end import LARGE, write_random_llama
from benchmarks.harness import command_of, on_gpu, report
from quant_engine import QuantConfig, convert


def timed(run: Callable[[Path], object], out: Path) -> float:
    """Seconds of one conversion, whose result is removed."""
    began = time.perf_counter()
    run(out)
    seconds = time.perf_counter() - began
    shutil.rmtree(out)
    return seconds


def measure(work: Path, layers: int, file_mb: int, bits: list[int]) -> list[dict[str, Any]]:
    """A row for each method and width."""
    source = work / "source"
    write_random_llama(source, LARGE | {"num_hidden_layers": layers}, file_mb * 10**6)
    os.sync()
    size = sum(file.stat().st_size for file in source.glob("*.safetensors")) / 1e6

    def affine(out: Path) -> None:
        mlx_lm.convert(str(source), str(out), quantize=True, q_bits=4, q_group_size=64)

    runs: list[tuple[str, int, Callable[[Path], object]]] = [("mlx-lm affine", 4, affine)]
    for width in bits:
        runs.append(("turboquant", width, lambda out, b=width: convert(source, out, config=QuantConfig(bits=b))))
    rows: list[dict[str, Any]] = []
    for method, width, run in runs:
        first, second = (timed(run, work / "out") for _ in range(2))
        rows.append({
            "method": method, "bits": width, "source_mb": round(size), "first_seconds": first, "seconds": second,
            "source_mb_per_s": size / second, "device": metal_kernels.device(),
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convert", description="Converting, disk to disk.")
    parser.add_argument("--layers", type=int, default=64 if on_gpu() else 8)
    parser.add_argument("--file-mb", type=int, default=1000, help="of a file of the checkpoint, at most")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder if not given")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        rows = measure(Path(folder), arguments.layers, arguments.file_mb, arguments.bits)
    command = command_of("convert", layers=arguments.layers, file_mb=arguments.file_mb, bits=arguments.bits)
    report("convert", command, rows)


if __name__ == "__main__":
    main()
