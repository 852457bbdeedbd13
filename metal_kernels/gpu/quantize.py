"""Quantization on a GPU: the reference operations, with the steps that repeat fused by MLX."""

from collections.abc import Callable
from functools import cache

import mlx.core as mx

from metal_kernels import reference
from metal_kernels.layout import bits_of, groups, pack

Step = Callable[..., tuple[mx.array, mx.array]]


def quantize(x: mx.array, codebook: tuple[float, ...], group_size: int, search: bool) -> tuple[mx.array, mx.array]:
    """As `reference.quantize`, to rounding."""
    rows, width = x.shape
    grouped = x.astype(mx.float32).reshape(rows, groups(width, group_size), -1)
    rms = mx.sqrt(mx.square(grouped).mean(-1, keepdims=True))
    scales = mx.minimum(_search(grouped, rms, codebook) if search else rms, 65504.0).astype(mx.float16)
    codes = _nearest(codebook)(grouped, scales).reshape(rows, width)
    return pack(codes, bits_of(codebook)), scales.reshape(rows, -1)


def _search(x: mx.array, rms: mx.array, codebook: tuple[float, ...]) -> mx.array:
    step, (best, most) = _step(codebook), (rms, mx.full(rms.shape, -1.0))
    for factor in reference.SEARCH_FACTORS:
        best, most = step(x, rms, mx.array(factor), best, most)
    return mx.maximum(step(x, best, mx.array(1.0), best, mx.full(rms.shape, -1.0))[0], 0.0)


@cache
def _step(codebook: tuple[float, ...]) -> Step:
    """One candidate against the best so far; compiled once for all candidates."""

    def run(x: mx.array, rms: mx.array, factor: mx.array, best: mx.array, most: mx.array) -> tuple[mx.array, mx.array]:
        candidate, gain = reference.fit(x, rms * factor, codebook)
        return mx.where(gain > most, candidate, best), mx.maximum(gain, most)

    return mx.compile(run)


@cache
def _nearest(codebook: tuple[float, ...]) -> Callable[[mx.array, mx.array], mx.array]:
    def run(x: mx.array, scales: mx.array) -> mx.array:
        divisor = scales.astype(mx.float32)
        return reference.nearest(x / mx.where(divisor > 0, divisor, 1.0), codebook)

    return mx.compile(run)
