"""Signs and blockwise Hadamard transforms of rows, in numba."""

from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from metal_kernels.cpu.arrays import view
from metal_kernels.cpu.threads import FEW_VALUES
from metal_kernels.cpu.vector import hadamard16

Rows = NDArray[np.float32]


def rotate_rows(x: Rows, signs: Rows | None, block: int, padded: int = 0) -> Rows:
    """(x * signs) @ H / sqrt(block), block by block, of x (n, width); zeros up to `padded` columns if given."""
    n, width = x.shape
    out = np.zeros((n, padded), np.float32) if padded > width else np.empty((n, width), np.float32)
    transform = _rotate_few if x.size <= FEW_VALUES else _rotate_many
    transform(x, _ones(width) if signs is None else signs, out, block, odd_factor(block))
    return out


def unrotate_rows(x: Rows, signs: Rows | None, block: int) -> Rows:
    """The inverse of `rotate_rows` for x (n, width)."""
    out = np.empty_like(x)
    transform = _rotate_few if x.size <= FEW_VALUES else _rotate_many
    transform(x, _ones(x.shape[1]), out, block, _turned_factor(block))
    if signs is not None:
        out *= signs
    return out


@cache
def _turned_factor(block: int) -> Rows:
    return np.ascontiguousarray(odd_factor(block).T)


@cache
def _ones(width: int) -> Rows:
    return np.ones(width, np.float32)


@cache
def odd_factor(block: int) -> Rows:
    """The small Hadamard matrix H_m of the block's m, (m, m), as MLX has it; (1, 1) for powers of two."""
    odd = block // (block & -block)
    if odd == 1:
        return np.ones((1, 1), np.float32)
    return view(mx.hadamard_transform(mx.eye(4 * odd), scale=1.0)).copy()


@njit(cache=True, fastmath=True, nogil=True, forceinline=True)
def _butterflies(v: Any, step: Any) -> None:
    """In place: the stages of the 2^k transform of all of v from `step` on, unnormalised, two at a time."""
    size = v.shape[0]
    while 4 * step <= size:
        for i in range(0, size, 4 * step):
            one, two, three, four = v[i : i + step], v[i + step :], v[i + 2 * step :], v[i + 3 * step :]
            for j in range(step):
                e, f, g, h = one[j] + two[j], one[j] - two[j], three[j] + four[j], three[j] - four[j]
                one[j], two[j], three[j], four[j] = e + g, f + h, e - g, f - h
        step *= 4
    if step < size:
        for j in range(step):
            v[j], v[j + step] = v[j] + v[j + step], v[j] - v[j + step]


@njit(cache=True, fastmath=True, nogil=True, forceinline=True)
def _rotate_row(x: Any, signs: Any, out: Any, block: Any, small: Any, scratch: Any) -> None:
    width, m = x.shape[0], small.shape[0]
    power = block // m
    norm = np.float32(1.0 / np.sqrt(block))
    if power >= 16:
        hadamard16(x.ctypes.data, signs.ctypes.data, out.ctypes.data, norm, width // 16)
    else:
        for i in range(width):
            out[i] = x[i] * signs[i] * norm
    for start in range(0, width, power):
        _butterflies(out[start : start + power], 16 if power >= 16 else 1)
    if m > 1:
        for start in range(0, width, block):
            scratch[:] = 0
            for a in range(m):
                source = out[start + a * power : start + (a + 1) * power]
                for b in range(m):
                    target = scratch[b * power : (b + 1) * power]
                    factor = small[a, b]
                    for j in range(power):
                        target[j] += factor * source[j]
            out[start : start + block] = scratch


@njit(cache=True, nogil=True)
def _rotate_few(x: Any, signs: Any, out: Any, block: Any, small: Any) -> None:
    scratch = np.empty(block, np.float32)
    for row in range(x.shape[0]):
        _rotate_row(x[row], signs, out[row], block, small, scratch)


@njit(cache=True, parallel=True, nogil=True)
def _rotate_many(x: Any, signs: Any, out: Any, block: Any, small: Any) -> None:
    for row in prange(x.shape[0]):
        _rotate_row(x[row], signs, out[row], block, small, np.empty(block, np.float32))
