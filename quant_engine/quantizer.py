"""A weight matrix to packed codes and back: TurboQuant's algorithm 1 (arXiv 2504.19874) with group scales."""

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx

from metal_kernels import dequantize, device, quantize, rotate, unrotate
from quant_engine import rotation
from quant_engine.codebook import lloyd_max
from quant_engine.config import GROUP_SIZES, QuantConfig
from quant_engine.errors import RecipeError
from quant_engine.residual import Residual, project

CHUNK_VALUES = 2**20
"""Weights quantized at a time, which bounds the memory that takes."""

GPU_CHUNK_VALUES = 2**23
"""The same on a GPU, where fewer would not outlast their launches."""


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized matrix (out, width).

    packed uint32 (out, width * bits / 32); scales float16 (out, groups); codebook of 2^bits ascending values;
    group_size 0 for one scale a row; seed and block of the rotation (block 1: none); residual: QJL's, if any.
    """

    packed: mx.array
    scales: mx.array
    codebook: tuple[float, ...]
    bits: int
    group_size: int
    seed: int
    block: int
    residual: Residual | None = None

    @property
    def width(self) -> int:
        """Inputs of the layer."""
        return self.packed.shape[1] * 32 // self.bits

    @property
    def shape(self) -> tuple[int, int]:
        """(out, width)."""
        return self.packed.shape[0], self.width

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, as on disk."""
        return self.packed.nbytes + self.scales.nbytes + (self.residual.nbytes if self.residual else 0)


def fitting_groups(width: int) -> list[int]:
    """The group sizes that divide a width; empty where no code fits, since rows must fill whole words."""
    return [] if width <= 0 or width % 32 else [g for g in GROUP_SIZES if g == 0 or width % g == 0]


def check_width(width: int, group_size: int) -> None:
    """Raise RecipeError, naming what fits, where groups of group_size do not divide a width."""
    fitting = fitting_groups(width)
    if not fitting:
        raise RecipeError(f"a width of {width} is not a multiple of 32, so no group size fits")
    if group_size not in fitting:
        options = ", ".join(str(g) if g else "0 (one scale a row)" for g in fitting)
        raise RecipeError(
            f"group_size {group_size} does not divide a width of {width}; the sizes that fit are {options}"
        )


def quantize_weight(
    weight: mx.array, config: QuantConfig, bits: int | None = None, block: int | None = None
) -> QuantizedWeight:
    """Quantize weight (out, width), any float dtype, with the recipe's bits and rotation.

    `bits` (1 to 4) and the Hadamard `block` (1: no rotation) take their place where they are given.

    Raises RecipeError where the width does not fit the recipe's groups or rotation.
    """
    width = weight.shape[1]
    check_width(width, config.group_size)
    bits = bits or config.bits
    block = block or rotation.choose_block(width, config.rotation)
    parts = [_quantize_rows(rows, config, bits, block) for rows in _chunks(weight)]
    return parts[0] if len(parts) == 1 else concatenate(parts)


def concatenate(parts: list[QuantizedWeight]) -> QuantizedWeight:
    """Stack matrices of one recipe, rows in order."""
    first = parts[0]
    errors = [part.residual for part in parts if part.residual]
    joined = (
        Residual(
            mx.concatenate([e.signs for e in errors]),
            mx.concatenate([e.norms for e in errors]),
            first.width,
            first.seed,
        )
        if errors
        else None
    )
    packed, scales = mx.concatenate([p.packed for p in parts]), mx.concatenate([p.scales for p in parts])
    return QuantizedWeight(
        packed, scales, first.codebook, first.bits, first.group_size, first.seed, first.block, joined
    )


def dequantize_weight(weight: QuantizedWeight) -> mx.array:
    """The matrix (out, width), float32, that the quantized layer multiplies by, in the original domain."""
    rotated = dequantize(weight.packed, weight.scales, weight.codebook)
    values = unrotate(rotated, _signs(weight.width, weight.seed, weight.block), weight.block)
    return values if weight.residual is None else values + weight.residual.dequantize()


def chunk_rows(width: int) -> int:
    """Rows of a matrix that are quantized at a time."""
    return max(1, (CHUNK_VALUES if device() == "cpu" else GPU_CHUNK_VALUES) // max(1, width))


def _chunks(weight: mx.array) -> Iterator[mx.array]:
    rows = chunk_rows(weight.shape[1])
    return (weight[first : first + rows] for first in range(0, weight.shape[0], rows))


def _signs(width: int, seed: int, block: int) -> mx.array | None:
    return mx.array(rotation.signs(width, seed)) if block > 1 else None


def _quantize_rows(weight: mx.array, config: QuantConfig, bits: int, block: int) -> QuantizedWeight:
    signs = _signs(weight.shape[1], config.seed, block)
    rotated = rotate(weight.astype(mx.float32), signs, block)
    codebook = lloyd_max(bits)
    packed, scales = quantize(rotated, codebook, config.group_size, config.scale == "search")
    errors = None
    if config.use_qjl:
        error = unrotate(rotated - dequantize(packed, scales, codebook), signs, block)
        errors = project(error, config.seed)
        mx.async_eval(errors.signs, errors.norms)
    mx.async_eval(packed, scales)
    return QuantizedWeight(packed, scales, codebook, bits, config.group_size, config.seed, block, errors)
