"""Keys and values of new tokens to codes and scales, in numba."""

from typing import Any

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from metal_kernels.cpu.quantize import half

REFITS = 2
FEW_ROWS = 16
"""Up to these a second thread takes longer to begin than to help."""


def pack_rows(
    x: NDArray[np.float32], table: NDArray[np.float32], group_size: int
) -> tuple[NDArray[np.uint32], NDArray[np.float16]]:
    """As `reference.pack_cache` for rotated rows x (n, size) and a codebook's values: uint32 (n, words), float16 (n,
    groups)."""
    n, size = x.shape
    bits = (len(table) - 1).bit_length()
    packed = np.empty((n, size * bits // 32), np.uint32)
    scales = np.empty((n, size // group_size), np.float32)
    pack = _pack_few if n <= FEW_ROWS else _pack_many
    pack(x, table, packed, scales, group_size, bits)
    return packed, scales.astype(np.float16)


@njit(cache=True, nogil=True)
def _assign(x: Any, table: Any, middles: Any, codes: Any) -> None:
    """The index of the nearest entry of an ascending table for each x; a value between two takes the lower."""
    n, last = x.shape[0], table.shape[0] - 1
    if last > 15:
        steps = np.float32(last) / (table[last] - table[0])
        for i in range(n):
            guess = min(last, max(0, int((x[i] - table[0]) * steps + np.float32(0.5))))
            # Rounding may have taken the entry beside the nearest.
            if guess < last and x[i] > middles[guess]:
                guess += 1
            elif guess > 0 and x[i] <= middles[guess - 1]:
                guess -= 1
            codes[i] = guess
        return
    codes[:] = 0
    for m in range(last):
        middle = middles[m]
        for i in range(n):
            codes[i] += np.uint32(1) if x[i] > middle else np.uint32(0)


@njit(cache=True, fastmath={"reassoc", "contract"}, nogil=True, forceinline=True)
def _scale(values: Any, table: Any, middles: Any, scaled: Any, codes: Any) -> Any:
    """The absolute maximum for tables of even steps, otherwise the root mean square refitted by least squares."""
    top, total = np.float32(0.0), np.float32(0.0)
    for i in range(values.shape[0]):
        top = max(top, abs(values[i]))
        total += values[i] * values[i]
    if table.shape[0] > 16:
        return top
    scale = np.float32(np.sqrt(total / np.float32(values.shape[0])))
    if scale < np.float32(1e-30):
        return scale
    for _ in range(REFITS):
        along, energy, inverse = np.float32(0.0), np.float32(0.0), np.float32(1.0) / scale
        for i in range(values.shape[0]):
            scaled[i] = values[i] * inverse
        _assign(scaled, table, middles, codes)
        for i in range(values.shape[0]):
            entry = table[codes[i]]
            along += values[i] * entry
            energy += entry * entry
        scale = along / energy
    return scale


@njit(cache=True, nogil=True)
def _pack(x: Any, table: Any, packed: Any, scales: Any, group: Any, bits: Any) -> None:
    """One row."""
    middles = np.float32(0.5) * (table[:-1] + table[1:])
    scaled, codes = np.empty(group, np.float32), np.empty(group, np.uint32)
    word, held, filled = 0, np.uint64(0), 0
    for g in range(scales.shape[0]):
        values = x[g * group : (g + 1) * group]
        scale = half(_scale(values, table, middles, scaled, codes))
        scales[g] = scale
        inverse = np.float32(1.0) / scale if scale > 0 else np.float32(1.0)
        for i in range(group):
            scaled[i] = values[i] * inverse
        _assign(scaled, table, middles, codes)
        for i in range(group):
            held |= np.uint64(codes[i]) << np.uint64(filled)
            filled += bits
            if filled >= 32:
                packed[word] = np.uint32(held & np.uint64(0xFFFFFFFF))
                held >>= np.uint64(32)
                word, filled = word + 1, filled - 32


@njit(cache=True, nogil=True)
def _pack_few(x: Any, table: Any, packed: Any, scales: Any, group: Any, bits: Any) -> None:
    for row in range(x.shape[0]):
        _pack(x[row], table, packed[row], scales[row], group, bits)


@njit(cache=True, parallel=True, nogil=True)
def _pack_many(x: Any, table: Any, packed: Any, scales: Any, group: Any, bits: Any) -> None:
    for row in prange(x.shape[0]):
        _pack(x[row], table, packed[row], scales[row], group, bits)
