"""Rotation: random signs, then a blockwise Hadamard transform."""

import mlx.core as mx

from metal_kernels import reference
from metal_kernels.cpu.arrays import rows_float32, view
from metal_kernels.cpu.hadamard import rotate_rows
from metal_kernels.dispatch import has_kernel
from metal_kernels.errors import ShapeError
from metal_kernels.layout import hadamard_block


def rotate(x: mx.array, signs: mx.array | None, block: int) -> mx.array:
    """Rotate the last axis of x (..., width): (x * signs) @ H / sqrt(block), block by block.

    signs is (width,) of +-1 or None; block is m * 2^k, m in 1, 12, 20, 28, and divides the width (1: no Hadamard).
    Returns x's dtype. Raises ShapeError where these do not fit.
    """
    check_rotation(x.shape[-1], signs, block)
    if block > 1 and has_kernel("rotate"):
        rows = rotate_rows(rows_float32(x), None if signs is None else view(signs), block)
        return mx.array(rows).reshape(x.shape).astype(x.dtype)
    return reference.rotate(x, signs, block)


def unrotate(x: mx.array, signs: mx.array | None, block: int) -> mx.array:
    """The inverse of `rotate`, with the same arguments."""
    check_rotation(x.shape[-1], signs, block)
    return reference.unrotate(x, signs, block)


def check_rotation(width: int, signs: mx.array | None, block: int) -> None:
    if signs is not None and signs.shape != (width,):
        raise ShapeError(f"signs of shape {signs.shape} for a width of {width}; they must be ({width},)")
    if block < 1 or width % block or hadamard_block(block) != block:
        raise ShapeError(
            f"a Hadamard block of {block} for a width of {width}; the largest that fits is {hadamard_block(width)}"
        )
