"""Products of activations with packed, dense and affine weights."""

from dataclasses import dataclass

import mlx.core as mx

from metal_kernels import reference
from metal_kernels.errors import ShapeError
from metal_kernels.hadamard import rotate


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A quantized matrix (out, width) and the rotation of its inputs.

    packed uint32 (out, width * bits / 32), scales float16 (out, groups), codebook of 2^bits ascending values,
    signs (width,) of +-1 or None, block the Hadamard size (1: none).
    """

    packed: mx.array
    scales: mx.array
    codebook: tuple[float, ...]
    signs: mx.array | None
    block: int

    @property
    def shape(self) -> tuple[int, int]:
        """(out, width)."""
        bits = (len(self.codebook) - 1).bit_length()
        return self.packed.shape[0], self.packed.shape[1] * 32 // bits


def matmul(x: mx.array, weight: PackedWeight) -> mx.array:
    """x (..., width), not yet rotated, times the transposed weight: (..., out) in x's dtype."""
    if x.shape[-1] != weight.shape[1]:
        raise ShapeError(f"activations {x.shape} for a weight of shape {weight.shape}; the last axis must be "
                         f"{weight.shape[1]}")
    rotated = rotate(x, weight.signs, weight.block)
    return reference.matmul(rotated, weight.packed, weight.scales, weight.codebook)


def dense(x: mx.array, weight: mx.array) -> mx.array:
    """x (..., width) times the transposed dense weight (out, width): (..., out)."""
    return x @ weight.T


def affine(x: mx.array, packed: mx.array, scales: mx.array, biases: mx.array, bits: int, group_size: int) -> mx.array:
    """x (..., width) times the transposed affine-quantized weight, as `mx.quantize` packs it: (..., out)."""
    return mx.quantized_matmul(x, packed, scales, biases, transpose=True, group_size=group_size, bits=bits)
