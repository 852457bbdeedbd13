"""Scale search, codes and packing of rotated rows, in numba."""

import math
from typing import Any

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from metal_kernels.reference import SEARCH_FACTORS


def quantize_rows(
    x: NDArray[np.float32], codebook: tuple[float, ...], group_size: int, search: bool
) -> tuple[NDArray[np.uint32], NDArray[np.float16]]:
    """As `reference.quantize`: canonical uint32 codes (rows, words) and float16 scales (rows, groups)."""
    rows, width = x.shape
    bits = (len(codebook) - 1).bit_length()
    group = group_size or width
    table = np.array(codebook, np.float32)
    factors = np.array(SEARCH_FACTORS if search else (), np.float32)
    packed = np.zeros((rows, width * bits // 32), np.uint32)
    scales = np.empty((rows, width // group), np.float32)
    _quantize(x, table, factors, packed, scales, group, bits)
    return packed, scales.astype(np.float16)


@njit(cache=True, fastmath=True, nogil=True, forceinline=True)
def _fit(magnitudes: Any, scale: Any, table: Any, values: Any) -> Any:
    """(<x, c>, <c, c>) of a group's magnitudes against their nearest codebook magnitudes at `scale`."""
    n, half = magnitudes.shape[0], table.shape[0] // 2
    inverse = np.float32(1.0) / scale
    values[:] = table[half]
    for k in range(half, 2 * half - 1):
        edge = np.float32(0.5) * (table[k] + table[k + 1])
        rise = table[k + 1] - table[k]
        for i in range(n):
            values[i] += rise if magnitudes[i] * inverse > edge else np.float32(0.0)
    along, energy = np.float32(0.0), np.float32(0.0)
    for i in range(n):
        along += magnitudes[i] * values[i]
        energy += values[i] * values[i]
    return along, energy


@njit(cache=True, fastmath=True, nogil=True, forceinline=True)
def _scale(magnitudes: Any, factors: Any, table: Any, values: Any) -> Any:
    """The searched scale of a group, or its root mean square where there are no factors to try."""
    total = np.float32(0.0)
    for i in range(magnitudes.shape[0]):
        total += magnitudes[i] * magnitudes[i]
    rms = np.sqrt(total / np.float32(magnitudes.shape[0]))
    if rms < np.float32(1e-30) or factors.shape[0] == 0:
        return rms
    best, most = rms, np.float32(-1.0)
    for f in range(factors.shape[0]):
        along, energy = _fit(magnitudes, rms * factors[f], table, values)
        gain = along * along / energy
        if gain > most:
            best, most = along / energy, gain
    along, energy = _fit(magnitudes, best, table, values)
    return along / energy


@njit(cache=True, nogil=True)
def half(value: Any) -> Any:
    """value, not negative, rounded to the nearest float16 (ties to even) and back; at most 65504."""
    if value >= np.float32(65504.0):
        return np.float32(65504.0)
    _, exponent = math.frexp(np.float64(value))
    unit = 2.0 ** max(exponent - 11, -24)
    return np.float32(np.rint(np.float64(value) / unit) * unit)


@njit(cache=True, fastmath=True, nogil=True, forceinline=True)
def _codes(values: Any, table: Any, codes: Any) -> None:
    """Index of the nearest table entry for each value."""
    codes[:] = 0
    for k in range(table.shape[0] - 1):
        edge = np.float32(0.5) * (table[k] + table[k + 1])
        for i in range(values.shape[0]):
            codes[i] += np.uint32(1) if values[i] > edge else np.uint32(0)


@njit(parallel=True, cache=True, nogil=True)
def _quantize(x: Any, table: Any, factors: Any, packed: Any, scales: Any, group: Any, bits: Any) -> None:
    for row in prange(x.shape[0]):
        values, scratch = np.empty(group, np.float32), np.empty(group, np.float32)
        codes = np.empty(group, np.uint32)
        for g in range(scales.shape[1]):
            first = g * group
            for i in range(group):
                values[i] = abs(x[row, first + i])
            scale = half(_scale(values, factors, table, scratch))
            scales[row, g] = scale
            inverse = np.float32(1.0) / scale if scale > 0 else np.float32(1.0)
            for i in range(group):
                values[i] = x[row, first + i] * inverse
            _codes(values, table, codes)
            for i in range(group):
                bit = (first + i) * bits
                word, shift = bit >> 5, bit & 31
                packed[row, word] |= codes[i] << np.uint32(shift)
                if shift + bits > 32:
                    packed[row, word + 1] |= codes[i] >> np.uint32(32 - shift)
