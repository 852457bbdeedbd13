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
    packed = np.zeros((n, size * bits // 32), np.uint32)
    scales = np.empty((n, size // group_size), np.float32)
    pack = _pack_few if n <= FEW_ROWS else _pack_many
    pack(x, table, packed, scales, group_size, bits)
    return packed, scales.astype(np.float16)


@njit(cache=True, nogil=True)
def _code(value: Any, table: Any) -> Any:
    """Index of the nearest entry of an ascending table, by bisection of its midpoints."""
    low, high = 0, table.shape[0] - 1
    while low < high:
        middle = (low + high) // 2
        if value > np.float32(0.5) * (table[middle] + table[middle + 1]):
            low = middle + 1
        else:
            high = middle
    return low


@njit(cache=True, nogil=True)
def _scale(values: Any, table: Any) -> Any:
    """The absolute maximum for 256-value tables, otherwise the root mean square refitted by least squares."""
    top, total = np.float32(0.0), np.float32(0.0)
    for value in values:
        top = max(top, abs(value))
        total += value * value
    if table.shape[0] == 256:
        return top
    scale = np.float32(np.sqrt(total / np.float32(values.shape[0])))
    if scale < np.float32(1e-30):
        return scale
    for _ in range(REFITS):
        along, energy, inverse = np.float32(0.0), np.float32(0.0), np.float32(1.0) / scale
        for value in values:
            entry = table[_code(value * inverse, table)]
            along += value * entry
            energy += entry * entry
        scale = along / energy
    return scale


@njit(cache=True, nogil=True)
def _pack(x: Any, table: Any, packed: Any, scales: Any, group: Any, bits: Any) -> None:
    """One row."""
    for g in range(scales.shape[0]):
        first = g * group
        scale = half(_scale(x[first : first + group], table))
        scales[g] = scale
        inverse = np.float32(1.0) / scale if scale > 0 else np.float32(1.0)
        for i in range(first, first + group):
            code = np.uint32(_code(x[i] * inverse, table))
            bit = i * bits
            word, shift = bit >> 5, bit & 31
            packed[word] |= code << np.uint32(shift)
            if shift + bits > 32:
                packed[word + 1] |= code >> np.uint32(32 - shift)


@njit(cache=True, nogil=True)
def _pack_few(x: Any, table: Any, packed: Any, scales: Any, group: Any, bits: Any) -> None:
    for row in range(x.shape[0]):
        _pack(x[row], table, packed[row], scales[row], group, bits)


@njit(cache=True, parallel=True, nogil=True)
def _pack_many(x: Any, table: Any, packed: Any, scales: Any, group: Any, bits: Any) -> None:
    for row in prange(x.shape[0]):
        _pack(x[row], table, packed[row], scales[row], group, bits)
