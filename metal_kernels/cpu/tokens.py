"""Keys and values as attention on a CPU gets them: float arrays or packed codes, and what a row may see of them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from metal_kernels.cpu.llvm_vector import available_lookups
from metal_kernels.cpu.streams import decode_bytes, decode_stream

Array = NDArray[np.float32]
LOOKUP = available_lookups()[-1]
MATH = {"contract", "arcp", "nsz", "reassoc"}
"""What kernels may change of float arithmetic: infinities keep their meaning, which masks need, and NaN its own."""


@dataclass(frozen=True)
class PackedTokens:
    """Keys or values of a cache: codes uint32 (B, H, T, words), scales uint16 bits of float16 (B, H, T, groups).

    table: what `lookup_table` makes of the codebook; `size` values in a token's head.
    """

    codes: NDArray[np.uint32]
    scales: NDArray[np.float16]
    table: Array
    size: int


Tokens = Array | PackedTokens


@dataclass(frozen=True)
class Visibility:
    """What a query row sees: a causal end, an additive bias (B, H, L, T), and a sink logit for each head."""

    causal: bool
    bias: Array | None
    sinks: Array | None


def sizes(tokens: Tokens) -> tuple[int, int]:
    """(heads, size of a head)."""
    if isinstance(tokens, PackedTokens):
        return tokens.codes.shape[1], tokens.size
    return tokens.shape[1], tokens.shape[3]


def grouped_by_head(queries: Array, heads: int) -> Array:
    """Queries as (B, key-value heads, query heads of each * L, D), contiguous."""
    batch, _, _, size = queries.shape
    return np.ascontiguousarray(queries).reshape(batch, heads, -1, size)


def sinks_or_none(sinks: Array | None, heads: int) -> Array:
    return np.full(heads, -np.inf, np.float32) if sinks is None else sinks


def lookup_table(codebook: tuple[float, ...]) -> Array:
    """The values that `decode` looks up: a codebook repeated up to 16 of them, or the 256 even steps of another."""
    return np.tile(np.array(codebook, np.float32), max(1, 16 // len(codebook)))


_HALVES: list[Array] = []


def half_table() -> Array:
    """float32 of all 65,536 float16 bit patterns: numba has no float16."""
    if not _HALVES:
        _HALVES.append(np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32))
    return _HALVES[0]


@njit(cache=True, nogil=True)
def decode(codes: Any, scales: Any, table: Any, halves: Any, out: Any) -> None:
    """Values (tokens, size), still rotated, of canonical codes (tokens, words) and scales (tokens, groups).

    table is as `lookup_table` makes it. Of a group whose size 16 does not divide the last values come one by one.
    """
    size, groups = out.shape[1], scales.shape[1]
    bits, group = codes.shape[1] * 32 // size, size // groups
    runs, last = group // 16, table.shape[0] - 1
    step = (table[last] - table[0]) / np.float32(last)
    for t in range(out.shape[0]):
        words, values = codes[t].ctypes.data, out[t].ctypes.data
        for g in range(groups):
            scale = halves[scales[t, g]]
            source, target = words + g * group * bits // 8, values + 4 * g * group
            if bits == 2:
                decode_stream(source, table.ctypes.data, scale, target, runs, 2, LOOKUP)
            elif bits == 3:
                decode_stream(source, table.ctypes.data, scale, target, runs, 3, LOOKUP)
            elif bits == 4:
                decode_stream(source, table.ctypes.data, scale, target, runs, 4, LOOKUP)
            else:
                decode_bytes(source, table[0] * scale, step * scale, target, runs)
            for i in range(g * group + 16 * runs, (g + 1) * group):
                word, shift = i * bits // 32, i * bits % 32
                code = np.uint64(codes[t, word]) >> np.uint64(shift)
                if shift + bits > 32:
                    code |= np.uint64(codes[t, word + 1]) << np.uint64(32 - shift)
                out[t, i] = table[code & np.uint64((1 << bits) - 1)] * scale
