"""Products of few rows of activations with a weight in tiles."""

from dataclasses import dataclass

import mlx.core as mx

from metal_kernels.gpu.hadamard import Activations
from metal_kernels.gpu.tiles import TILE_ROWS, TileWeight
from metal_kernels.launch import SIMD, Dialect, Kernel

COLUMNS = 8
"""Rows of halves that share a decoded weight; more take several turns."""

MATVEC = Kernel(
    name="turboquant_matvec",
    sources=("codes.metal", "matvec.metal"),
    inputs=("x", "x_scales", "codes", "scales", "table"),
    outputs=("out",),
    body="""
  THREADGROUP_ARRAY(float, partial, SLICES * TILES * 16 * COLUMNS);
  turboquant::matvec<BITS, GROUP, TILES, SLICES, PARTS, COLUMNS, NVIDIA, T>(
      x, x_scales, codes, scales, table, out, partial, x_shape[0], codes_shape[0], codes_shape[1],
      16 * codes_shape[0] - SPARE, threadgroup_position_in_grid.x, threadgroup_position_in_grid.y,
      simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
""",
)


@dataclass(frozen=True)
class Split:
    """How a product is shared out: tiles of a threadgroup, simdgroups that take turns along its rows."""

    tiles: int
    slices: int
    columns: int = COLUMNS


def choose_split(tiles: int, blocks: int) -> Split:
    """The split that was fastest on an H200 for this many tiles of rows and blocks of columns."""
    if blocks >= 32:
        return Split(1, 8)
    return Split(1, min(8, max(1, blocks)))


def constants(
    weight: TileWeight, x: Activations, split: Split, dialect: Dialect, dtype: mx.Dtype
) -> dict[str, int | bool | mx.Dtype]:
    """The kernel's compile-time values."""
    nvidia = dialect == "cuda"
    columns = split.columns if nvidia else min(COLUMNS, 1 << (x.n * x.parts - 1).bit_length())
    return {
        "BITS": weight.bits,
        "GROUP": weight.group,
        "TILES": split.tiles,
        "SLICES": split.slices,
        "PARTS": x.parts,
        "COLUMNS": columns,
        "NVIDIA": nvidia,
        "SPARE": weight.tiles * TILE_ROWS - weight.rows,
        "T": dtype,
    }


def matvec(
    x: Activations, weight: TileWeight, dialect: Dialect, dtype: mx.Dtype, split: Split | None = None
) -> mx.array:
    """x (n, width), made ready by `prepare`, times the transposed weight: (n, rows) in `dtype`."""
    split = split or choose_split(weight.tiles, weight.codes.shape[1])
    values = constants(weight, x, split, dialect, dtype)
    groups = (-(-weight.tiles // split.tiles), -(-x.n * x.parts // int(values["COLUMNS"])))  # pyright: ignore[reportArgumentType]
    inputs = [x.halves, x.scales, weight.codes, weight.scales, weight.table]
    return MATVEC.launch(inputs, [((x.n, weight.rows), dtype)], groups, SIMD * split.slices, values)[0]
