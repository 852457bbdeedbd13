"""Normalisation of rows on a CPU: MLX's takes six passes there."""

from typing import Any

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

SERIAL_VALUES = 32768
"""Up to so many values one thread is faster than two."""


def rms_rows(x: NDArray[np.float32], weight: NDArray[np.float32], eps: np.float32) -> NDArray[np.float32]:
    """x / sqrt(mean(x^2) + eps) * weight for rows x (n, width)."""
    out = np.empty_like(x)
    kernel = _serial if x.size <= SERIAL_VALUES else _parallel
    kernel(x, weight, eps, out)
    return out


@njit(cache=True, fastmath=True, nogil=True, forceinline=True)
def _row(x: Any, weight: Any, eps: Any, out: Any) -> None:
    total = np.float32(0.0)
    for i in range(x.shape[0]):
        total += x[i] * x[i]
    factor = np.float32(1.0) / np.sqrt(total / np.float32(x.shape[0]) + eps)
    for i in range(x.shape[0]):
        out[i] = x[i] * factor * weight[i]


@njit(cache=True, nogil=True)
def _serial(x: Any, weight: Any, eps: Any, out: Any) -> None:
    for r in range(x.shape[0]):
        _row(x[r], weight, eps, out[r])


@njit(cache=True, parallel=True, nogil=True)
def _parallel(x: Any, weight: Any, eps: Any, out: Any) -> None:
    for r in prange(x.shape[0]):
        _row(x[r], weight, eps, out[r])
