"""One vector times a quantized square matrix: TurboQuant against `mx.quantized_matmul` and a plain read.

python -m benchmarks.matvec [--size 4096]
"""

import argparse
from collections.abc import Callable

import mlx.core as mx
import numpy as np

import metal_kernels
from benchmarks.harness import median_seconds, report
from quant_engine.codebook import lloyd_max
from quant_engine.rotation import choose_block, signs

COPIES = 8
"""Weights in turn, so that together they exceed the cache."""


def turns(run: Callable[[int], object]) -> float:
    """Median microseconds of `run(copy)` with each call on the next copy of the weights."""
    at = iter(range(10**9))
    return 1e6 * median_seconds(lambda: run(next(at) % COPIES), repeats=40, warm_up=COPIES)


def measure(size: int, group_size: int = 64) -> list[dict[str, object]]:
    """Rows of method, bits, microseconds, and the ratio to affine at the same bits."""
    x = mx.random.normal((1, size))
    weight = mx.random.normal((size, size))
    rows: list[dict[str, object]] = []
    for bits in (2, 3, 4):
        affine, turbo, read = _times(x, weight, bits, group_size)
        path = metal_kernels.kernel_path()
        for method, us, ran in (
            ("mx.quantized_matmul", affine, "mlx"),
            ("turboquant", turbo, path),
            ("numpy sum of the packed words, 1 thread", read, "numpy"),
        ):
            row = {"size": size, "bits": bits, "method": method, "us": us, "times_affine": affine / us, "path": ran}
            rows.append(row)
    return rows


def _times(x: mx.array, weight: mx.array, bits: int, group_size: int) -> tuple[float, float, float]:
    """Microseconds of affine, of TurboQuant, and of summing the packed words."""
    size = x.shape[1]
    block, turn = choose_block(size, "auto"), mx.array(signs(size, 0))
    packed, scales = metal_kernels.quantize(weight, lloyd_max(bits), group_size)
    ours = [metal_kernels.PackedWeight(packed + 0, scales, lloyd_max(bits), turn, block) for _ in range(COPIES)]
    theirs = [mx.quantize(weight, group_size=group_size, bits=bits) for _ in range(COPIES)]
    words = [np.array(packed + 0) for _ in range(COPIES)]
    mx.eval(x, theirs)
    affine = turns(lambda i: mx.eval(mx.quantized_matmul(x, *theirs[i], group_size=group_size, bits=bits)))
    metal_kernels.reset_paths()
    turbo = turns(lambda i: mx.eval(metal_kernels.matmul(x, ours[i])))
    return affine, turbo, turns(lambda i: words[i].sum(dtype=np.uint32))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", type=int, default=4096)
    args = parser.parse_args()
    report("matvec", f"python -m benchmarks.matvec --size {args.size}", measure(args.size))


if __name__ == "__main__":
    main()
