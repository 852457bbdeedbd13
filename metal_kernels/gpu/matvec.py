"""Products of few rows of activations with a weight in tiles."""

from dataclasses import replace

import mlx.core as mx

from metal_kernels.gpu.hadamard import Activations
from metal_kernels.gpu.tiles import BYTE_TABLE, TileWeight
from metal_kernels.launch import SIMD, Kernel

COLUMNS = 8
"""At most so many rows of halves share a decoded weight; more take several turns."""
SIMDGROUPS = 8
"""Of a threadgroup on NVIDIA."""
FEW_TILES, MOST_TILES = 640, 2048
"""Up to so many tiles many slices of each fill a GPU, or some; beyond them tiles do, and sums need less joining."""

MATVEC = Kernel(
    name="turboquant_matvec",
    sources=("matvec.metal",),
    inputs=("x", "packed", "added"),
    outputs=("out",),
    large_memory=BYTE_TABLE,
)
ALONE = replace(MATVEC, name="turboquant_matvec_alone", inputs=MATVEC.inputs[:-1])
"""With nothing to add, and one array less, for which MLX takes time."""


def slices_of(weight: TileWeight) -> int:
    """Simdgroups that share out a row's blocks of columns: as many as were fastest on an H200, in calls one by one."""
    slices = SIMDGROUPS if weight.tiles <= FEW_TILES else SIMDGROUPS // 2 if weight.tiles <= MOST_TILES else 2
    return min(slices, weight.blocks)


def teams_of(weight: TileWeight) -> int:
    """Tiles that a threadgroup takes: on NVIDIA its simdgroups share a table."""
    return max(1, SIMDGROUPS // slices_of(weight)) if weight.nvidia else 1


def groups_of(weight: TileWeight) -> int:
    """Threadgroups that share out a weight's tiles."""
    return -(-weight.tiles // teams_of(weight))


def threads_of(weight: TileWeight) -> int:
    """Threads of each."""
    return SIMD * slices_of(weight) * teams_of(weight)


def constants(weight: TileWeight, x: Activations, dtype: mx.Dtype, columns: int) -> dict[str, int | bool | mx.Dtype]:
    """The kernel's compile-time values but `shapes`; columns, 1, 2, 4 or 8: rows of halves for a decoded weight."""
    return {
        **weight.constants,
        **x.constants,
        "SLICES": slices_of(weight),
        "TEAMS": teams_of(weight),
        "COLUMNS": columns,
        "T": dtype,
    }


def shapes(weight: TileWeight, n: int) -> dict[str, int | bool | mx.Dtype]:
    """A weight's shape and n rows of activations as compile-time values: MLX takes time for a shape at each launch."""
    return {"ALL_TILES": weight.words.shape[0], "BLOCKS": weight.blocks, "COUNT": n}


def matvec(x: Activations, weight: TileWeight, dtype: mx.Dtype, added: mx.array | None = None) -> mx.array:
    """x (n, width), made ready by `prepare`, times the transposed weight, plus `added` (n or 1, rows): (n, rows).

    In `dtype`, which is that of `added`.
    """
    columns = min(COLUMNS, 1 << (x.n * x.parts - 1).bit_length())
    values = constants(weight, x, dtype, columns) | shapes(weight, x.n)
    values["ADDED"] = 0 if added is None else len(added)
    groups = groups_of(weight), -(-x.n * x.parts // columns)
    kernel, more = (ALONE, []) if added is None else (MATVEC, [added])
    inputs = [x.halves, weight.words, *more]
    return kernel.launch(inputs, [((x.n, weight.rows), dtype)], groups, threads_of(weight), values)[0]
