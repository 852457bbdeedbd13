"""Products of few rows of activations with a weight in tiles."""

from dataclasses import dataclass, replace

import mlx.core as mx

from metal_kernels.gpu.hadamard import Activations
from metal_kernels.gpu.tiles import BYTE_TABLE, TileWeight
from metal_kernels.launch import SIMD, Kernel

COLUMNS = 8
"""At most so many rows of halves share a decoded weight; more take several turns."""
SIMDGROUPS = 8
"""Of a threadgroup on NVIDIA."""
RESIDENT = 396
"""Threadgroups that run at once there: registers are enough for three on each of an H100's multiprocessors."""
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


@dataclass(frozen=True)
class Walk:
    """How `tiles` are shared out: in each of `groups` threadgroups `teams` of `slices` simdgroups take them in turn."""

    tiles: int
    groups: int
    teams: int
    slices: int

    @property
    def threads(self) -> int:
        """Of a threadgroup."""
        return SIMD * self.teams * self.slices

    @property
    def constants(self) -> dict[str, int | bool | mx.Dtype]:
        """The compile-time values of walking so."""
        return {"SLICES": self.slices, "TEAMS": self.teams, "WALKS": self.groups * self.teams < self.tiles}


def walk_of(weight: TileWeight, walkers: int = 1) -> Walk:
    """The walk over a weight's tiles where `walkers` go at once, in as many slices as were fastest on an H200.

    On NVIDIA a threadgroup's simdgroups share a table, and there are no more threadgroups than run at once.
    """
    tiles = weight.tiles
    slices = SIMDGROUPS if tiles <= FEW_TILES else SIMDGROUPS // 2 if tiles <= MOST_TILES else 2
    slices = min(slices, weight.blocks)
    if not weight.nvidia:
        return Walk(tiles, tiles, 1, slices)
    teams = max(1, SIMDGROUPS // slices)
    return Walk(tiles, min(-(-tiles // teams), max(1, RESIDENT // walkers)), teams, slices)


def constants(
    weight: TileWeight, x: Activations, dtype: mx.Dtype, columns: int, walk: Walk
) -> dict[str, int | bool | mx.Dtype]:
    """The kernel's compile-time values but `shapes`; columns, 1, 2, 4 or 8: rows of halves for a decoded weight."""
    return {**weight.constants, **x.constants, **walk.constants, "COLUMNS": columns, "T": dtype}


def shapes(weight: TileWeight, n: int) -> dict[str, int | bool | mx.Dtype]:
    """A weight's shape and n rows of activations as compile-time values: MLX takes time for a shape at each launch."""
    return {"ALL_TILES": weight.words.shape[0], "BLOCKS": weight.blocks, "COUNT": n}


def matvec(x: Activations, weight: TileWeight, dtype: mx.Dtype, added: mx.array | None = None) -> mx.array:
    """x (n, width), made ready by `prepare`, times the transposed weight, plus `added` (n or 1, rows): (n, rows).

    In `dtype`, which is that of `added`.
    """
    columns = min(COLUMNS, 1 << (x.n * x.parts - 1).bit_length())
    turns = -(-x.n * x.parts // columns)
    walk = walk_of(weight, turns)
    values = constants(weight, x, dtype, columns, walk) | shapes(weight, x.n)
    values["ADDED"] = 0 if added is None else len(added)
    kernel, more = (ALONE, []) if added is None else (MATVEC, [added])
    inputs, out = [x.halves, weight.words, *more], ((x.n, weight.rows), dtype)
    return kernel.launch(inputs, [out], (walk.groups, turns), walk.threads, values)[0]
