"""Keys and values as attention on a CPU gets them: float arrays or packed codes, and what a row may see of them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Array = NDArray[np.float32]
MATH = {"contract", "arcp", "nsz", "reassoc"}
"""What kernels may change of float arithmetic: infinities keep their meaning, which masks need."""


@dataclass(frozen=True)
class PackedTokens:
    """Keys or values of a cache: codes uint32 (B, H, T, words), scales uint16 bits of float16 (B, H, T, groups).

    table float32 of 2^bits values; `size` values in a token's head.
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


_HALVES: list[Array] = []


def half_table() -> Array:
    """float32 of all 65,536 float16 bit patterns: numba has no float16."""
    if not _HALVES:
        _HALVES.append(np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32))
    return _HALVES[0]


@njit(cache=True, nogil=True)
def decode(codes: Any, scales: Any, table: Any, halves: Any, out: Any) -> None:
    """Values (tokens, size), still rotated, of canonical codes (tokens, words) and scales (tokens, groups)."""
    size, groups = out.shape[1], scales.shape[1]
    bits, group = codes.shape[1] * 32 // size, size // groups
    mask = np.uint32((1 << bits) - 1)
    for t in range(out.shape[0]):
        words, values = codes[t], out[t]
        for g in range(groups):
            scale = halves[scales[t, g]]
            for i in range(g * group, (g + 1) * group):
                bit = i * bits
                word, shift = bit >> 5, bit & 31
                code = words[word] >> np.uint32(shift)
                if shift + bits > 32:
                    code |= words[word + 1] << np.uint32(32 - shift)
                values[i] = table[code & mask] * scale
