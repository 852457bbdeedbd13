"""Gated activations of many values at once: MLX's own exponential takes 16 ns a value on a CPU."""

from typing import Any

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from metal_kernels.cpu.exponential import exp_in_place

CHUNK = 8192


def swiglu(gate: NDArray[np.float32], up: NDArray[np.float32]) -> NDArray[np.float32]:
    """gate / (1 + exp(-gate)) * up, element by element, of contiguous arrays of the same shape."""
    out = np.empty_like(gate)
    kernel = _serial if gate.size <= CHUNK else _parallel
    kernel(gate.reshape(-1), up.reshape(-1), out.reshape(-1))
    return out


@njit(cache=True, fastmath=True, nogil=True, forceinline=True)
def _swiglu(gate: Any, up: Any, out: Any) -> None:
    for i in range(gate.shape[0]):
        out[i] = -gate[i]
    exp_in_place(out, np.empty(gate.shape[0], np.int32))
    for i in range(gate.shape[0]):
        out[i] = gate[i] / (np.float32(1.0) + out[i]) * up[i]


@njit(cache=True, nogil=True)
def _serial(gate: Any, up: Any, out: Any) -> None:
    _swiglu(gate, up, out)


@njit(cache=True, parallel=True, nogil=True)
def _parallel(gate: Any, up: Any, out: Any) -> None:
    for part in prange((gate.shape[0] + CHUNK - 1) // CHUNK):
        first, last = part * CHUNK, min((part + 1) * CHUNK, gate.shape[0])
        _swiglu(gate[first:last], up[first:last], out[first:last])
