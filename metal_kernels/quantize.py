"""Rotated rows to packed codes and scales, and back."""

from collections.abc import Callable
from functools import cache

import mlx.core as mx

from metal_kernels import reference
from metal_kernels.cpu.arrays import rows_float32
from metal_kernels.cpu.quantize import quantize_rows
from metal_kernels.dispatch import has_kernel
from metal_kernels.errors import ShapeError
from metal_kernels.layout import bits_of, groups, words


def quantize(
    x: mx.array, codebook: tuple[float, ...], group_size: int, search: bool = True
) -> tuple[mx.array, mx.array]:
    """Quantize rotated rows x (rows, width): uint32 codes (rows, width * bits / 32), float16 scales (rows, groups).

    The codebook is ascending, group_size divides the width (0: one scale a row); `search` minimises each group's
    squared error over its scale, otherwise the scale is the group's root mean square. Raises ShapeError.
    """
    if x.ndim != 2:
        raise ShapeError(f"an array of shape {x.shape} to quantize; it must be (rows, width)")
    words(x.shape[1], bits_of(codebook))
    groups(x.shape[1], group_size)
    if has_kernel("quantize"):
        packed, scales = quantize_rows(rows_float32(x), codebook, group_size, search)
        return mx.array(packed), mx.array(scales)
    return _compiled(codebook, group_size, search)(x)


@cache
def _compiled(
    codebook: tuple[float, ...], group_size: int, search: bool
) -> Callable[[mx.array], tuple[mx.array, mx.array]]:
    """The reference operations, fused by MLX where it can."""

    def run(x: mx.array) -> tuple[mx.array, mx.array]:
        return reference.quantize(x, codebook, group_size, search)

    return mx.compile(run)


def dequantize(
    packed: mx.array, scales: mx.array, codebook: tuple[float, ...], dtype: mx.Dtype = mx.float32
) -> mx.array:
    """Values (..., width), in the rotated domain, of packed codes (..., words) and scales (..., groups)."""
    return reference.dequantize(packed, scales, codebook, dtype)
