"""Products of many rows of activations with a weight in tiles, on matrix units."""

from dataclasses import dataclass

import mlx.core as mx

from metal_kernels.gpu.hadamard import Activations
from metal_kernels.gpu.tiles import PAIR_TABLE, TileWeight
from metal_kernels.launch import SIMD, Dialect, Kernel

MATMUL = Kernel(
    name="turboquant_matmul",
    sources=("matmul.metal",),
    inputs=("x", "packed"),
    outputs=("out",),
    large_memory=PAIR_TABLE,
)


@dataclass(frozen=True)
class Shape:
    """A threadgroup's share: tiles and pieces of 8 columns of a simdgroup, and how many of these side by side."""

    tiles: int
    pieces: int
    row_groups: int
    column_groups: int

    @property
    def columns(self) -> int:
        """Rows of halves that a threadgroup multiplies by."""
        return 8 * self.pieces * self.column_groups

    @property
    def threads(self) -> int:
        return SIMD * self.row_groups * self.column_groups


SHAPES: dict[Dialect, Shape] = {"cuda": Shape(2, 8, 4, 1), "metal": Shape(2, 4, 4, 1)}
"""Fastest on an H200; for Apple's, which has not run yet, half as many sums in registers."""


def matmul(
    x: Activations, weight: TileWeight, dialect: Dialect, dtype: mx.Dtype, shape: Shape | None = None
) -> mx.array:
    """x (n, width), made ready by `prepare`, times the transposed weight: (n, rows) in `dtype`."""
    shape = shape or SHAPES[dialect]
    groups = groups_of(weight, shape), -(-x.n * x.parts // shape.columns)
    inputs = [x.halves, weight.words]
    out = ((x.n, weight.rows), dtype)
    return MATMUL.launch(inputs, [out], groups, shape.threads, constants(weight, x, shape, dtype))[0]


def groups_of(weight: TileWeight, shape: Shape) -> int:
    """Threadgroups that share out a weight's tiles."""
    return -(-weight.tiles // (shape.tiles * shape.row_groups))


def constants(weight: TileWeight, x: Activations, shape: Shape, dtype: mx.Dtype) -> dict[str, int | bool | mx.Dtype]:
    """The kernel's compile-time values."""
    return {
        **weight.constants,
        **x.constants,
        "TILES": shape.tiles,
        "PIECES": shape.pieces,
        "ROW_GROUPS": shape.row_groups,
        "COLUMN_GROUPS": shape.column_groups,
        "T": dtype,
    }
