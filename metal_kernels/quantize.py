"""Rotated rows to packed codes and scales, and back."""

import mlx.core as mx

from metal_kernels import reference
from metal_kernels.cpu.arrays import rows_float32
from metal_kernels.cpu.quantize import quantize_rows
from metal_kernels.dispatch import kernel_backend
from metal_kernels.errors import ShapeError
from metal_kernels.gpu import quantize as gpu
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
    backend = kernel_backend("quantize", gpu_fits=gpu.fits(codebook, x.shape[1], group_size))
    if backend == "cpu":
        packed, scales = quantize_rows(rows_float32(x), codebook, group_size, search)
        return mx.array(packed), mx.array(scales)
    if backend is not None:
        return gpu.quantize(x, codebook, group_size, search)
    return reference.quantize(x, codebook, group_size, search)


def dequantize(
    packed: mx.array, scales: mx.array, codebook: tuple[float, ...], dtype: mx.Dtype = mx.float32
) -> mx.array:
    """Values (..., width), in the rotated domain, of packed codes (..., words) and scales (..., groups)."""
    return reference.dequantize(packed, scales, codebook, dtype)
