"""Products with a mixture's experts: TurboQuant against `mx.gather_qmm` at the same bits and `mx.gather_mm`.

    python -m benchmarks.experts [--experts 128] [--active 4] [--width 2880] [--tokens 1 8 512] [--bits 3 4]

Each token's experts are drawn evenly. From 16 tokens on, rows come sorted by expert, as mlx-lm's models sort them. On a
GPU calls wait for each other, as a model's do: each begins with what it needs of the result of the one before.
"""

import argparse
from typing import Any

import mlx.core as mx

import metal_kernels
from benchmarks.harness import Step, beginning, command_of, microseconds_in_turn, on_gpu, path_of, report
from benchmarks.matvec import GROUP, random_weights

CHOICES = 8
"""Draws of experts that take turns, so that their weights are not all in the cache."""


def measure(count: int, active: int, width: int, tokens: int, bits: list[int]) -> list[dict[str, Any]]:
    """Rows of method and microseconds for one number of tokens."""
    dtype = mx.float16 if on_gpu() else mx.float32
    ordered = tokens >= 16
    shape = (tokens * active, 1, width) if ordered else (tokens, 1, 1, width)
    x = mx.random.normal(shape, dtype)
    chosen = [_choices(count, active, tokens, ordered, seed) for seed in range(CHOICES)]
    mx.eval(x, chosen)
    floats = width**-0.5 * mx.random.normal((count, width, width), dtype)
    steps: list[tuple[str, int, Step]] = [("float", 8 * dtype.size, lambda x, i: mx.gather_mm(
        x, floats.swapaxes(-1, -2), rhs_indices=chosen[i % CHOICES], sorted_indices=ordered))]  # fmt: skip
    for b in bits:
        parts, ours = (
            mx.quantize(floats, group_size=GROUP, bits=b),
            metal_kernels.Experts(random_weights(width, width, b, count)),
        )
        mx.eval(parts)
        steps.append(("affine", b, lambda x, i, b=b, parts=parts: mx.gather_qmm(
            x, *parts, rhs_indices=chosen[i % CHOICES], transpose=True, group_size=GROUP, bits=b,
            sorted_indices=ordered)))  # fmt: skip
        steps.append(("turboquant", b, lambda x, i, ours=ours: metal_kernels.expert_matmul(
            x, ours, chosen[i % CHOICES], ordered)))  # fmt: skip
    times = microseconds_in_turn(
        [lambda x, i, step=step: beginning(step(x, i), shape) for _, _, step in steps], x, CHOICES
    )
    affine = {b: us for (method, b, _), us in zip(steps, times, strict=True) if method == "affine"}
    return [
        {"experts": count, "active": active, "width": width, "tokens": tokens, "bits": b, "method": method, "us": us,
         "times_affine": affine[b] / us if b in affine else None,
         "path": path_of(step, x) if method == "turboquant" else "mlx"}
        for (method, b, step), us in zip(steps, times, strict=True)
    ]  # fmt: skip


def _choices(count: int, active: int, tokens: int, ordered: bool, seed: int) -> mx.array:
    draws = mx.argsort(mx.random.uniform(shape=(tokens, count), key=mx.random.key(seed)), axis=1)[:, :active]
    chosen = draws.astype(mx.uint32)
    return mx.sort(chosen.reshape(-1)) if ordered else chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--experts", type=int, default=128 if on_gpu() else 16)
    parser.add_argument("--active", type=int, default=4)
    parser.add_argument("--width", type=int, default=2880 if on_gpu() else 1024)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 512] if on_gpu() else [1, 64])
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4])
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for tokens in args.tokens:
        rows += measure(args.experts, args.active, args.width, tokens, args.bits)
    report("experts", command_of("experts", **vars(args)), rows)


if __name__ == "__main__":
    main()
