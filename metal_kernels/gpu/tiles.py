"""Weights laid out for a GPU: built once from the canonical layout; `source/codes.metal` describes the words."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from metal_kernels.errors import KernelError
from metal_kernels.gpu.fixed import fixed_words
from metal_kernels.gpu.words import codes_of, words_of
from metal_kernels.launch import Dialect, made
from metal_kernels.layout import bits_of, pack, unpack

TILE_ROWS = 16
BLOCK_COLUMNS = 256
BITS = (2, 3, 4)
CODE_WORDS = TILE_ROWS * BLOCK_COLUMNS // 32
"""Of a block, for each bit of a code."""
BYTE_TABLE, PAIR_TABLE = 64 << 10, 32 << 10
"""Bytes of threadgroup memory for a table that NVIDIA's kernels decode with: of bytes, for few rows, or of pairs."""
TABLE = "LOW0", "LOW1", "HIGH0", "HIGH1"
"""The compile-time values of a `decoding_table`."""
CODES_AT_ONCE = 1 << 24
"""Codes that are unpacked at the same time while a weight is laid out, four bytes each."""


Arrays = tuple[mx.array, mx.array]
Recipe = tuple[int, int, int, int, int, tuple[int, ...], bool, int]


@dataclass(frozen=True, eq=False)
class TileWeight:
    """A packed matrix in tiles of 16 rows and blocks of 256 columns, padded with scales of zero, and its rotation.

    words uint32 (tiles, blocks, enough): the `codes`, the `scales`, then `fixed`, in one array since MLX takes time for
    every array of a launch. fixed: `fixed_words`. group 0: one scale a row. block: the Hadamard
    transform's (1: none). table: a `decoding_table`. nvidia: codes lie as NVIDIA's kernels want them. The tiles of all
    experts, `rows` rows each, follow each other.
    """

    words: mx.array
    fixed: mx.array
    bits: int
    group: int
    rows: int
    width: int
    block: int
    table: tuple[int, ...]
    nvidia: bool
    experts: int = 1

    @property
    def arrays(self) -> Arrays:
        """What a compiled product is called with; with `recipe` after it, a TileWeight's own arguments."""
        return self.words, self.fixed

    @property
    def recipe(self) -> Recipe:
        """What a product is compiled for."""
        return self.bits, self.group, self.rows, self.width, self.block, self.table, self.nvidia, self.experts

    @property
    def constants(self) -> dict[str, int | bool | mx.Dtype]:
        """The compile-time values of reading it."""
        spare = self.tiles * TILE_ROWS - self.rows
        return {
            "BITS": self.bits, "GROUP": self.group, "SPARE": spare, "NVIDIA": self.nvidia,
            **dict(zip(TABLE, self.table, strict=True)),
        }  # fmt: skip

    @property
    def codes(self) -> mx.array:
        """uint32 (tiles, blocks, bits, 32 lanes, 4)."""
        shape = *self.words.shape[:2], self.bits, 32, 4
        return self.words.reshape(-1)[: math.prod(shape)].reshape(shape)

    @property
    def scales(self) -> mx.array:
        """float16 (tiles, blocks, 8, groups of a block, 2), or (tiles, 1, 8, 1, 2) with one scale a row."""
        tiles, blocks = self.words.shape[:2]
        groups = BLOCK_COLUMNS // self.group if self.group else 1
        shape = tiles, blocks if self.group else 1, 8, groups, 2
        first = tiles * blocks * CODE_WORDS * self.bits
        return self.words.reshape(-1)[first : first + math.prod(shape) // 2].view(mx.float16).reshape(shape)

    @property
    def tiles(self) -> int:
        """Tiles of one expert's rows, or of the only matrix's."""
        return self.words.shape[0] // self.experts

    @property
    def blocks(self) -> int:
        """Blocks of a tile's columns."""
        return self.words.shape[1]

    def take(self, rows: mx.array) -> tuple[mx.array, mx.array]:
        """The canonical packed codes (n, words) and scales (n, groups) of the rows (n,) of the matrix."""
        tile, row = rows // TILE_ROWS, rows % TILE_ROWS
        lanes = 4 * (row % 8)[:, None] + mx.arange(4, dtype=row.dtype)
        codes = mx.take_along_axis(self.codes[tile], lanes[:, None, None, :, None], axis=3)
        blocks = codes.shape[1]
        words = codes.transpose(0, 1, 3, 2, 4).reshape(-1, blocks, 4, 4, self.bits)
        both = _by_column(codes_of(words, self.bits, self.nvidia), self.bits)
        chosen = mx.take_along_axis(both, (row // 8)[:, None, None].astype(mx.uint32), axis=1)[:, 0, : self.width]
        own = mx.take_along_axis(self.scales[tile], (row % 8)[:, None, None, None, None], axis=2)
        own = mx.take_along_axis(own, (row // 8)[:, None, None, None, None], axis=4)
        return pack(chosen, self.bits), own.reshape(rows.size, -1)[:, : self.width // self.group if self.group else 1]

    @property
    def padded(self) -> int:
        """The width in whole blocks, which activations must have too."""
        return self.blocks * BLOCK_COLUMNS


def symmetric(codebook: tuple[float, ...]) -> bool:
    """Whether a codebook's halves mirror each other about zero, which kernels' sign and magnitude need."""
    values = np.array(codebook, np.float16)
    return np.array_equal(values, -values[::-1])


def fits(codebook: tuple[float, ...]) -> bool:
    """Whether the kernels take weights of this codebook."""
    return bits_of(codebook) in BITS and symmetric(codebook)


def table_words(values: np.ndarray) -> mx.array:
    """Two words of low bytes and two of high bytes of eight float16 values, uint32 (4,); fewer values are repeated."""
    halves = np.resize(values, 8).view(np.uint16)
    low, high = (halves & 0xFF).astype(np.uint8), (halves >> 8).astype(np.uint8)
    return mx.array(np.concatenate([low.view(np.uint32), high.view(np.uint32)]))


def decoding_table(codebook: tuple[float, ...]) -> tuple[int, ...]:
    """What the kernels decode with, see `table_words`: magnitudes, and where there is room the same with a minus.

    Four signed numbers of 32 bits.
    Raises KernelError for a codebook that is not symmetric about zero, which the kernels' sign and magnitude need.
    """
    if not symmetric(codebook):
        raise KernelError(
            f"the GPU kernels need a codebook symmetric about zero, not {codebook}; use the reference "
            "backend for this weight"
        )
    magnitudes = np.array(codebook[len(codebook) // 2 :], np.float16)
    words = table_words(magnitudes if len(codebook) == 16 else np.concatenate([magnitudes, -magnitudes]))
    return tuple(np.array(words).view(np.int32).tolist())


def arrange(
    packed: mx.array,
    scales: mx.array,
    codebook: tuple[float, ...],
    gpu: Dialect,
    signs: mx.array | None = None,
    block: int = 1,
) -> TileWeight:
    """Lay out canonical packed (rows, words) and float16 scales (rows, groups) in tiles, for a GPU's kernels.

    Raises KernelError where the kernels cannot multiply by them.
    """
    bits, rows, nvidia = bits_of(codebook), packed.shape[0], gpu == "cuda"
    if bits not in BITS:
        raise KernelError(f"the GPU kernels take weights of 2, 3 or 4 bits, not {bits}; use the reference backend")
    width = packed.shape[1] * 32 // bits
    step = max(1, CODES_AT_ONCE // width // TILE_ROWS) * TILE_ROWS
    parts: list[mx.array] = []
    for first in range(0, rows, step):
        parts.append(_tiles(packed[first : first + step], bits, width, nvidia))
        mx.eval(parts[-1])
    group = 0 if scales.shape[1] == 1 else width // scales.shape[1]
    tiled = _tile_scales(scales, group, parts[0].shape[1])
    table = decoding_table(codebook)
    fixed = fixed_words(mx.array(table).view(mx.uint32), signs, width)
    return TileWeight(in_one(parts, [tiled], fixed), fixed, bits, group, rows, width, block, table, nvidia)


def in_one(codes: Sequence[mx.array], scales: Sequence[mx.array], fixed: mx.array) -> mx.array:
    """The words of a weight, see `TileWeight`, whose tiles' codes and scales come in pieces.

    As many words for each block as make room for all.
    """
    tiles, blocks = sum(map(len, codes)), codes[0].shape[1]
    words = [mx.contiguous(piece).reshape(-1).view(mx.uint32) for piece in scales]
    parts = [*(piece.reshape(-1) for piece in codes), *words, fixed]
    spare = -sum(part.size for part in parts) % (tiles * blocks)
    return made(mx.concatenate([*parts, mx.zeros((spare,), mx.uint32)]).reshape(tiles, blocks, -1))


def restore(weight: TileWeight) -> tuple[mx.array, mx.array]:
    """The canonical packed codes and scales that `arrange` was given."""
    tiles, blocks = weight.codes.shape[:2]
    words = weight.codes.transpose(0, 1, 3, 2, 4).reshape(tiles, blocks, 32, 4, weight.bits)
    codes = _by_column(codes_of(words, weight.bits, weight.nvidia), weight.bits)
    packed = pack(codes.reshape(tiles * TILE_ROWS, -1)[: weight.rows, : weight.width], weight.bits)
    scales = weight.scales.transpose(0, 4, 2, 1, 3).reshape(tiles * TILE_ROWS, -1)
    groups = weight.width // weight.group if weight.group else 1
    return packed, scales[: weight.rows, :groups]


def _tiles(packed: mx.array, bits: int, width: int, nvidia: bool) -> mx.array:
    codes = unpack(packed, bits, width)
    rows, columns = -packed.shape[0] % TILE_ROWS, -width % BLOCK_COLUMNS
    codes = mx.pad(codes, [(0, rows), (0, columns)], constant_values=1 << (bits - 1))
    tiles, blocks = codes.shape[0] // TILE_ROWS, codes.shape[1] // BLOCK_COLUMNS
    # Rows as (r, g), columns as (block, unit, p, t, s, h, e), see codes.metal.
    axes = codes.reshape(tiles, 2, 8, blocks, 4, 2, 4, 2, 2, 2)
    planes = axes.transpose(0, 3, 2, 6, 4, 5, 7, 8, 9, 1).reshape(tiles, blocks, 32, 4, 4, 8)
    middle = 1 << (bits - 1)
    signed = mx.where(planes < middle, 2 * middle - 1 - planes, planes - middle)
    words = words_of(signed, bits, nvidia)
    return words.reshape(tiles, blocks, 32, bits, 4).transpose(0, 1, 3, 2, 4)


def _by_column(planes: mx.array, bits: int) -> mx.array:
    """Stored codes (tiles, blocks, lanes, 4, 4, 8) as codebook indices (tiles, half the lanes, columns)."""
    middle = 1 << (bits - 1)
    codes = mx.where(planes < middle, planes + middle, 2 * middle - 1 - planes)
    tiles, blocks, lanes = planes.shape[:3]
    axes = codes.reshape(tiles, blocks, lanes // 4, 4, 4, 2, 2, 2, 2, 2)
    return axes.transpose(0, 9, 2, 1, 4, 5, 3, 6, 7, 8).reshape(tiles, lanes // 2, -1)


def _tile_scales(scales: mx.array, group: int, blocks: int) -> mx.array:
    each, blocks = (BLOCK_COLUMNS // group, blocks) if group else (1, 1)
    padded = mx.pad(scales, [(0, -scales.shape[0] % TILE_ROWS), (0, each * blocks - scales.shape[1])])
    return padded.reshape(-1, 2, 8, blocks, each).transpose(0, 3, 2, 4, 1)
