"""Products of few rows of activations with a weight in tiles."""

from dataclasses import dataclass, replace

import mlx.core as mx

from metal_kernels.gpu.architecture import memory_of
from metal_kernels.gpu.hadamard import Activations
from metal_kernels.gpu.tiles import BYTE_TABLE, TILE_ROWS, TileWeight
from metal_kernels.launch import SIMD, Kernel

COLUMNS = 8
"""At most so many rows of halves share a decoded weight; more take several turns."""
SIMDGROUPS = {2: 24, 3: 24, 4: 16}
"""Of a threadgroup on NVIDIA, by bits: as many as were fastest on an H200."""
MULTIPROCESSORS = 132
"""Threadgroups that run at once there."""
FEW_TILES, MOST_TILES = 640, 2048
"""Up to so many tiles many simdgroups for each fill another GPU, or some; beyond them tiles do."""

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
class Shares:
    """How tiles are shared out: each of `groups` threadgroups takes a run of them, whose blocks its simdgroups share.

    pieces: tiles of which a simdgroup has blocks, at most.
    """

    groups: int
    simdgroups: int
    pieces: int

    @property
    def threads(self) -> int:
        """Of a threadgroup."""
        return SIMD * self.simdgroups

    @property
    def constants(self) -> dict[str, int | bool | mx.Dtype]:
        """The compile-time values of sharing so."""
        return {"SIMDGROUPS": self.simdgroups, "PIECES": self.pieces}


def shares(tiles: int, blocks: int, simdgroups: int, groups: int, most_pieces: int, each: int = 1) -> Shares:
    """Of tiles of as many blocks, or of `each` that belong together, in `groups` threadgroups that run at once.

    Or in several times as many, where simdgroups would have more than `most_pieces`, which are `each` at least.
    """
    for count in range(groups, tiles + groups, groups):
        most = each * -(-tiles // count)
        pieces = min(most, (-(-most * blocks // simdgroups) - 2 + blocks) // blocks + 1)
        if pieces <= most_pieces:
            return Shares(min(count, tiles), simdgroups, pieces)
    raise AssertionError(f"{most_pieces} pieces are fewer than {each}")


def shares_of(weight: TileWeight, columns: int, at_once: int = 1) -> Shares:
    """Of a weight's tiles, where as many columns, and `at_once` of such products, are multiplied at the same time."""
    tiles = weight.tiles
    if weight.nvidia:
        simdgroups, groups = SIMDGROUPS[weight.bits], max(1, MULTIPROCESSORS // at_once)
        most_pieces = memory_of("cuda") // (4 * simdgroups * TILE_ROWS * columns)
        return shares(tiles, weight.blocks, simdgroups, groups, most_pieces)
    simdgroups = 8 if tiles <= FEW_TILES else 4 if tiles <= MOST_TILES else 2
    return Shares(tiles, min(simdgroups, weight.blocks), 1)


def constants(
    weight: TileWeight, x: Activations, dtype: mx.Dtype, columns: int, share: Shares
) -> dict[str, int | bool | mx.Dtype]:
    """The kernel's compile-time values but `shapes`; columns, 1, 2, 4 or 8: rows of halves for a decoded weight."""
    return {**weight.constants, **x.constants, **share.constants, "COLUMNS": columns, "T": dtype}


def shapes(weight: TileWeight, n: int) -> dict[str, int | bool | mx.Dtype]:
    """A weight's shape and n rows of activations as compile-time values: MLX takes time for a shape at each launch."""
    return {"ALL_TILES": weight.words.shape[0], "BLOCKS": weight.blocks, "COUNT": n}


def matvec(x: Activations, weight: TileWeight, dtype: mx.Dtype, added: mx.array | None = None) -> mx.array:
    """x (n, width), made ready by `prepare`, times the transposed weight, plus `added` (n or 1, rows): (n, rows).

    In `dtype`, which is that of `added`.
    """
    columns = min(COLUMNS, 1 << (x.n * x.parts - 1).bit_length())
    turns = -(-x.n * x.parts // columns)
    share = shares_of(weight, columns, turns)
    values = constants(weight, x, dtype, columns, share) | shapes(weight, x.n)
    values["ADDED"] = 0 if added is None else len(added)
    kernel, more = (ALONE, []) if added is None else (MATVEC, [added])
    inputs, out = [x.halves, weight.words, *more], ((x.n, weight.rows), dtype)
    return kernel.launch(inputs, [out], (share.groups, turns), share.threads, values)[0]
