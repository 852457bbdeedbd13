"""Weights laid out for vector registers: built once from the canonical layout, see `vector` for the fields."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from metal_kernels.cpu.threads import FEW_VALUES
from metal_kernels.layout import bits_of

FIELDS = 32
LEAST_ROWS = 4
"""Rows that the product kernels take at a time; smaller matrices are padded to it."""


def lanes_for(width: int) -> int:
    """16 lanes, or 8 where blocks of 512 would pad a row of `width` by a quarter more than blocks of 256."""
    return 8 if padded_width(width, 8) < 0.8 * padded_width(width, 16) else 16


def padded_width(width: int, lanes: int) -> int:
    """`width` rounded up to whole blocks of 32 * lanes."""
    block = FIELDS * lanes
    return -(-width // block) * block


@dataclass(frozen=True, eq=False)
class LaneWeight:
    """A packed matrix in lane blocks.

    codes uint32 (rows, blocks, bits, lanes); scales uint16, the bits of float16, (rows, groups) padded with zeros;
    table float32 (16,), the codebook repeated; per_scale: lanes that share a scale, 0 for one scale a row.
    `rows` and `width` are those of the matrix, without padding.
    """

    codes: NDArray[np.uint32]
    scales: NDArray[np.uint16]
    table: NDArray[np.float32]
    bits: int
    per_scale: int
    rows: int
    width: int

    @property
    def lanes(self) -> int:
        """Runs of 32 values that lie side by side."""
        return self.codes.shape[3]

    @property
    def padded(self) -> int:
        """The width in whole blocks, which activations must have too."""
        return self.codes.shape[1] * FIELDS * self.lanes

    def take(self, rows: NDArray[Any]) -> "LaneWeight":
        """A matrix of the chosen rows, in order."""
        return replace(self, codes=self.codes[rows], scales=self.scales[rows], rows=len(rows))


def arrange(packed: NDArray[np.uint32], scales: NDArray[np.float16], codebook: tuple[float, ...]) -> LaneWeight:
    """Lay out canonical packed (rows, words) and float16 scales (rows, groups) in lane blocks."""
    bits = bits_of(codebook)
    rows, width = packed.shape[0], packed.shape[1] * 32 // bits
    lanes = lanes_for(width)
    blocks = padded_width(width, lanes) // (FIELDS * lanes)
    codes = np.zeros((max(rows, LEAST_ROWS), blocks, bits, lanes), np.uint32)
    _to_lanes(np.ascontiguousarray(packed), codes, width)
    n_groups = scales.shape[1]
    per_scale = 0 if n_groups == 1 else width // n_groups // FIELDS
    padded_groups = blocks * lanes // per_scale if per_scale else 1
    halves = np.zeros((codes.shape[0], padded_groups), np.uint16)
    halves[:rows, :n_groups] = scales.view(np.uint16)
    table = np.tile(np.array(codebook, np.float32), 16 // len(codebook))
    return LaneWeight(codes, halves, table, bits, per_scale, rows, width)


def restore(weight: LaneWeight) -> tuple[NDArray[np.uint32], NDArray[np.float16]]:
    """The canonical packed codes and scales that `arrange` was given."""
    packed = np.zeros((weight.rows, weight.width * weight.bits // 32), np.uint32)
    _from_lanes(weight.codes, packed, weight.width)
    group = weight.per_scale * FIELDS or weight.width
    return packed, np.ascontiguousarray(weight.scales[: weight.rows, : weight.width // group]).view(np.float16)


def in_lane_order(x: NDArray[np.float32], lanes: int) -> NDArray[np.float32]:
    """Activations (n, width), in whole blocks, in the order of `LaneWeight`'s fields and lanes."""
    out = np.empty_like(x)
    reorder = _reorder_few if x.size <= FEW_VALUES else _reorder_many
    reorder(x.reshape(-1, lanes, FIELDS), out.reshape(-1, FIELDS, lanes))
    return out


@njit(cache=True, nogil=True)
def _turn_over(x: Any, out: Any) -> None:
    for lane in range(x.shape[0]):
        for field in range(FIELDS):
            out[field, lane] = x[lane, field]


@njit(cache=True, nogil=True)
def _reorder_few(x: Any, out: Any) -> None:
    for block in range(x.shape[0]):
        _turn_over(x[block], out[block])


@njit(cache=True, parallel=True, nogil=True)
def _reorder_many(x: Any, out: Any) -> None:
    for block in prange(x.shape[0]):
        _turn_over(x[block], out[block])


@njit(cache=True, inline="always")
def _code(words: Any, bit: Any, mask: Any) -> Any:
    """The code of a canonical row that begins at a bit; it may lie across two words."""
    word, shift = bit >> 5, bit & 31
    code = words[word] >> np.uint32(shift)
    if shift > 0 and word + 1 < words.shape[0]:
        code |= words[word + 1] << np.uint32(32 - shift)
    return code & mask


@njit(cache=True, inline="always")
def _place(field: Any, bits: Any) -> Any:
    """The word of a field and the bit that it begins at; word `bits` for one that has a bit of every word."""
    half, per_half = field // 2, 16 // bits
    word = half // per_half
    return word, np.uint32(16 * (field % 2) + (bits * (half % per_half) if word < bits else 15))


@njit(cache=True, parallel=True, nogil=True)
def _to_lanes(packed: Any, codes: Any, width: Any) -> None:
    blocks, bits, lanes = codes.shape[1:]
    mask = np.uint32((1 << bits) - 1)
    for row in prange(packed.shape[0]):
        words = packed[row]
        for block in range(blocks):
            out = codes[row, block]
            for lane in range(lanes):
                first = (block * lanes + lane) * FIELDS
                for field in range(min(FIELDS, width - first)):
                    word, shift = _place(field, bits)
                    code = _code(words, (first + field) * bits, mask)
                    if word < bits:
                        out[word, lane] |= code << shift
                    else:
                        for bit in range(bits):
                            out[bit, lane] |= ((code >> np.uint32(bit)) & np.uint32(1)) << shift


@njit(cache=True, parallel=True, nogil=True)
def _from_lanes(codes: Any, packed: Any, width: Any) -> None:
    blocks, bits, lanes = codes.shape[1:]
    mask = np.uint32((1 << bits) - 1)
    for row in prange(packed.shape[0]):
        words = packed[row]
        for block in range(blocks):
            held = codes[row, block]
            for lane in range(lanes):
                first = (block * lanes + lane) * FIELDS
                for field in range(min(FIELDS, width - first)):
                    word, shift = _place(field, bits)
                    code = np.uint32(0)
                    if word < bits:
                        code = (held[word, lane] >> shift) & mask
                    else:
                        for bit in range(bits):
                            code |= ((held[bit, lane] >> shift) & np.uint32(1)) << np.uint32(bit)
                    bit = (first + field) * bits
                    words[bit >> 5] |= code << np.uint32(bit & 31)
                    if (bit & 31) + bits > 32:
                        words[(bit >> 5) + 1] |= code >> np.uint32(32 - (bit & 31))
