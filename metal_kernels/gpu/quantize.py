"""Quantization on a GPU: one launch for scales, codes and packing."""

import mlx.core as mx

from metal_kernels.launch import SIMD, Kernel, table
from metal_kernels.layout import bits_of, groups, words
from metal_kernels.reference import SEARCH_FACTORS

MOST_BITS = 4
SIMDGROUPS = 8
"""Groups of values that a threadgroup quantizes, each by itself."""

QUANTIZE = Kernel(
    name="turboquant_quantize",
    sources=("quantize.metal",),
    inputs=("x", "codebook", "factors"),
    outputs=("codes", "scales"),
)


def fits(codebook: tuple[float, ...], width: int, group_size: int) -> bool:
    """Whether the kernel takes such codes and groups."""
    return bits_of(codebook) <= MOST_BITS and (group_size or width) % SIMD == 0


def quantize(x: mx.array, codebook: tuple[float, ...], group_size: int, search: bool) -> tuple[mx.array, mx.array]:
    """As `reference.quantize`, to rounding."""
    (rows, width), bits = x.shape, bits_of(codebook)
    count = rows * groups(width, group_size)
    grouped = x.astype(mx.float32).reshape(count, group_size or width)
    constants = {"BITS": bits, "FACTORS": len(SEARCH_FACTORS) if search else 0, "SIMDGROUPS": SIMDGROUPS}
    outputs = [((rows, words(width, bits)), mx.uint32), ((rows, count // rows), mx.float16)]
    inputs = [grouped, table(codebook), table(SEARCH_FACTORS)]
    codes, scales = QUANTIZE.launch(inputs, outputs, (-(-count // SIMDGROUPS), 1), SIMD * SIMDGROUPS, constants)
    return codes, scales
