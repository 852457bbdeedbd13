"""Products of few rows of activations with a weight in tiles."""

from dataclasses import replace

import mlx.core as mx

from metal_kernels.gpu.hadamard import Activations
from metal_kernels.gpu.tiles import TileWeight
from metal_kernels.launch import SIMD, Kernel

COLUMNS = 8
"""At most so many rows of halves share a decoded weight; more take several turns."""
FEW_TILES, MOST_TILES = 640, 2048
"""Up to so many tiles many slices of each fill a GPU, or some; beyond them tiles do, and sums need less joining."""

MATVEC = Kernel(
    name="turboquant_matvec",
    sources=("matvec.metal",),
    inputs=("x", "packed", "added"),
    outputs=("out",),
)
ALONE = replace(MATVEC, name="turboquant_matvec_alone", inputs=MATVEC.inputs[:-1])
"""With nothing to add, and one array less, for which MLX takes time."""


def slices_of(weight: TileWeight, columns: int) -> int:
    """Simdgroups that share out a row's blocks of columns: as many as were fastest on an H200, in calls one by one."""
    some = 6 if columns < COLUMNS else 4
    slices = 8 if weight.tiles <= FEW_TILES else some if weight.tiles <= MOST_TILES else 2
    return min(slices, weight.blocks)


def constants(weight: TileWeight, x: Activations, dtype: mx.Dtype, columns: int) -> dict[str, int | bool | mx.Dtype]:
    """The kernel's compile-time values but `shapes`; columns, 1, 2, 4 or 8: rows of halves for a decoded weight."""
    return {
        **weight.constants,
        **x.constants,
        "SLICES": slices_of(weight, columns),
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
    groups = (weight.tiles, -(-x.n * x.parts // columns))
    kernel, more = (ALONE, []) if added is None else (MATVEC, [added])
    inputs = [x.halves, weight.words, *more]
    return kernel.launch(inputs, [((x.n, weight.rows), dtype)], groups, SIMD * slices_of(weight, columns), values)[0]
