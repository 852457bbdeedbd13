"""The stacked queries, keys and values of a layer as heads: normed, turned by rotary embeddings, in one pass."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

SERIAL_VALUES = 16384
"""Up to so many values one thread is faster than two."""

Array = NDArray[np.float32]


@dataclass(frozen=True)
class HeadNorms:
    """RMS norms of each head of queries and keys: weights (size,) and what is added under the root."""

    queries: Array
    keys: Array
    eps: float


def split_heads(
    rows: Array, batch: int, heads: int, kv_heads: int, cos: Array, sin: Array, norms: HeadNorms | None
) -> tuple[Array, Array, Array]:
    """Queries (B, heads, L, size), keys and values (B, kv_heads, L, size) of rows (B * L, (heads + 2 kv_heads) size).

    cos, sin (L, size / 2) of the L positions turn value i with value i + size / 2 of queries and keys.
    """
    size = 2 * cos.shape[1]
    q, k, v = (np.empty((batch, n, len(cos), size), np.float32) for n in (heads, kv_heads, kv_heads))
    none = np.empty(0, np.float32)
    q_norm, k_norm, eps = (norms.queries, norms.keys, norms.eps) if norms else (none, none, 0.0)
    kernel = _serial if rows.size <= SERIAL_VALUES else _parallel
    kernel(rows, cos, sin, q_norm, k_norm, np.float32(eps), q, k, v)
    return q, k, v


@njit(cache=True, fastmath=True, nogil=True, forceinline=True)
def _turned(source: Any, cos: Any, sin: Any, weight: Any, eps: Any, out: Any) -> None:
    half = cos.shape[0]
    factor = np.float32(1.0)
    if weight.shape[0] > 0:
        total = np.float32(0.0)
        for i in range(source.shape[0]):
            total += source[i] * source[i]
        factor = np.float32(1.0) / np.sqrt(total / np.float32(source.shape[0]) + eps)
        for i in range(half):
            first, second = source[i] * factor * weight[i], source[half + i] * factor * weight[half + i]
            out[i] = first * cos[i] - second * sin[i]
            out[half + i] = first * sin[i] + second * cos[i]
    else:
        for i in range(half):
            out[i] = source[i] * cos[i] - source[half + i] * sin[i]
            out[half + i] = source[i] * sin[i] + source[half + i] * cos[i]


@njit(cache=True, nogil=True)
def _row(r: Any, rows: Any, cos: Any, sin: Any, q_norm: Any, k_norm: Any, eps: Any, q: Any, k: Any, v: Any) -> None:
    heads, kv_heads, length, size = q.shape[1], k.shape[1], q.shape[2], q.shape[3]
    entry, at, row = r // length, r % length, rows[r]
    for h in range(heads):
        _turned(row[h * size : (h + 1) * size], cos[at], sin[at], q_norm, eps, q[entry, h, at])
    for h in range(kv_heads):
        first = (heads + h) * size
        _turned(row[first : first + size], cos[at], sin[at], k_norm, eps, k[entry, h, at])
        first += kv_heads * size
        v[entry, h, at, :] = row[first : first + size]


@njit(cache=True, nogil=True)
def _serial(rows: Any, cos: Any, sin: Any, q_norm: Any, k_norm: Any, eps: Any, q: Any, k: Any, v: Any) -> None:
    for r in range(rows.shape[0]):
        _row(r, rows, cos, sin, q_norm, k_norm, eps, q, k, v)


@njit(cache=True, parallel=True, nogil=True)
def _parallel(rows: Any, cos: Any, sin: Any, q_norm: Any, k_norm: Any, eps: Any, q: Any, k: Any, v: Any) -> None:
    for r in prange(rows.shape[0]):
        _row(r, rows, cos, sin, q_norm, k_norm, eps, q, k, v)
