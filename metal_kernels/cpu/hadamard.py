"""Signs and blockwise Hadamard transforms of rows, in numba."""

from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

Rows = NDArray[np.float32]


def rotate_rows(x: Rows, signs: Rows | None, block: int, padded: int = 0) -> Rows:
    """(x * signs) @ H / sqrt(block), block by block, of x (n, width); zeros up to `padded` columns if given."""
    n, width = x.shape
    out = np.zeros((n, padded), np.float32) if padded > width else np.empty((n, width), np.float32)
    transform = _rotate_one if n == 1 else _rotate_many
    transform(x, _ones(width) if signs is None else signs, out, block, odd_factor(block))
    return out


@cache
def _ones(width: int) -> Rows:
    return np.ones(width, np.float32)


@cache
def odd_factor(block: int) -> Rows:
    """The small Hadamard matrix H_m of the block's m, (m, m), as MLX has it; (1, 1) for powers of two."""
    odd = block // (block & -block)
    return np.array(mx.hadamard_transform(mx.eye(4 * odd), scale=1.0)) if odd > 1 else np.ones((1, 1), np.float32)


@njit(cache=True, fastmath=True, nogil=True, inline="always")
def _butterflies(v: Any, start: Any, size: Any) -> None:
    """In place: the 2^k transform of v[start : start + size], unnormalised; four points at a time."""
    step = 1
    while 4 * step <= size:
        for i in range(start, start + size, 4 * step):
            for j in range(i, i + step):
                a, b, c, d = v[j], v[j + step], v[j + 2 * step], v[j + 3 * step]
                e, f, g, h = a + b, a - b, c + d, c - d
                v[j], v[j + step], v[j + 2 * step], v[j + 3 * step] = e + g, f + h, e - g, f - h
        step *= 4
    if step < size:
        for j in range(start, start + step):
            a, b = v[j], v[j + step]
            v[j], v[j + step] = a + b, a - b


@njit(cache=True, fastmath=True, nogil=True)
def _rotate_row(x: Any, signs: Any, out: Any, block: Any, small: Any, scratch: Any) -> None:
    width, m = x.shape[0], small.shape[0]
    power = block // m
    norm = np.float32(1.0 / np.sqrt(block))
    for i in range(width):
        out[i] = x[i] * signs[i] * norm
    if power > 1:
        for start in range(0, width, power):
            _butterflies(out, start, power)
    if m > 1:
        for start in range(0, width, block):
            scratch[:] = 0
            for a in range(m):
                for b in range(m):
                    factor = small[a, b]
                    for j in range(power):
                        scratch[b * power + j] += factor * out[start + a * power + j]
            out[start : start + block] = scratch


@njit(cache=True, nogil=True)
def _rotate_one(x: Any, signs: Any, out: Any, block: Any, small: Any) -> None:
    _rotate_row(x[0], signs, out[0], block, small, np.empty(block, np.float32))


@njit(cache=True, parallel=True, nogil=True)
def _rotate_many(x: Any, signs: Any, out: Any, block: Any, small: Any) -> None:
    for row in prange(x.shape[0]):
        _rotate_row(x[row], signs, out[row], block, small, np.empty(block, np.float32))
