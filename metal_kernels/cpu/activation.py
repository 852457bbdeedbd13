"""Gated activations of many values at once: MLX's own exponential takes 16 ns a value on a CPU."""

from typing import Any

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

CHUNK = 4096


def swiglu(gate: NDArray[np.float32], up: NDArray[np.float32]) -> NDArray[np.float32]:
    """gate / (1 + exp(-gate)) * up, element by element, of contiguous arrays of the same shape."""
    out = np.empty_like(gate)
    kernel = _serial if gate.size <= CHUNK else _parallel
    kernel(gate.reshape(-1), up.reshape(-1), out.reshape(-1))
    return out


@njit(cache=True, fastmath=True, nogil=True)
def _swiglu(gate: Any, up: Any, out: Any) -> None:
    """exp by Cody and Waite's reduction to [-ln 2 / 2, ln 2 / 2] and a polynomial, to 2 units in the last place."""
    power = np.empty(gate.shape[0], np.int32)
    bits = power.view(np.float32)
    for i in range(gate.shape[0]):
        z = min(max(-gate[i], np.float32(-87.0)), np.float32(87.0))
        n = np.rint(z * np.float32(1.44269504))
        r = z - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
        p = np.float32(1.9875691e-4) * r + np.float32(1.3981999e-3)
        p = p * r + np.float32(8.3334519e-3)
        p = p * r + np.float32(4.1665796e-2)
        p = p * r + np.float32(1.6666665e-1)
        p = p * r + np.float32(0.5)
        out[i] = p * r * r + r + np.float32(1.0)
        power[i] = (np.int32(n) + np.int32(127)) << np.int32(23)
    for i in range(gate.shape[0]):
        out[i] = gate[i] / (np.float32(1.0) + out[i] * bits[i]) * up[i]


@njit(cache=True, nogil=True)
def _serial(gate: Any, up: Any, out: Any) -> None:
    _swiglu(gate, up, out)


@njit(cache=True, parallel=True, nogil=True)
def _parallel(gate: Any, up: Any, out: Any) -> None:
    for part in prange((gate.shape[0] + CHUNK - 1) // CHUNK):
        first, last = part * CHUNK, min((part + 1) * CHUNK, gate.shape[0])
        _swiglu(gate[first:last], up[first:last], out[first:last])
