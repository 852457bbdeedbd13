"""exp of many float32 values, in a form that vectorises without a vector math library."""

from typing import Any

import numpy as np
from numba import njit

from metal_kernels.cpu.tokens import MATH


@njit(cache=True, fastmath=MATH, nogil=True, forceinline=True)
def exp_in_place(values: Any, scratch: Any) -> None:
    """Replace float32 values by their exponential; below -87 by e^-87, about 1e-38, above 87 by e^87.

    Cody and Waite's reduction to [-ln 2 / 2, ln 2 / 2] and a polynomial of degree 7: relative error below 3e-7.
    scratch is int32 of the same length.
    """
    for i in range(values.shape[0]):
        z = min(max(values[i], np.float32(-87.0)), np.float32(87.0))
        n = np.rint(z * np.float32(1.44269504))
        r = z - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
        p = np.float32(1.9875691e-4) * r + np.float32(1.3981999e-3)
        p = p * r + np.float32(8.3334519e-3)
        p = p * r + np.float32(4.1665796e-2)
        p = p * r + np.float32(1.6666665e-1)
        p = p * r + np.float32(0.5)
        values[i] = p * r * r + r + np.float32(1.0)
        scratch[i] = (np.int32(n) + np.int32(127)) << np.int32(23)
    powers = scratch.view(np.float32)
    for i in range(values.shape[0]):
        values[i] *= powers[i]


@njit(cache=True, fastmath=MATH, nogil=True, forceinline=True)
def exp_under_maximum(row: Any, before: Any, scratch: Any) -> Any:
    """Replace float32 scores by their exponentials under the greatest of them and `before`: (that, their sum).

    Where all are minus infinity they become 0, where one is NaN all become NaN. scratch as for `exp_in_place`.
    """
    top, check = before, np.float32(0.0)
    for t in range(row.shape[0]):
        top = max(top, row[t])
    for t in range(row.shape[0]):
        check += row[t]
    if check != check:
        row[:] = np.float32(np.nan)
        return max(before, np.float32(0.0)), np.float32(np.nan)
    if top == np.float32(-np.inf):
        row[:] = np.float32(0.0)
        return top, np.float32(0.0)
    for t in range(row.shape[0]):
        row[t] -= top
    exp_in_place(row, scratch)
    total = np.float32(0.0)
    for t in range(row.shape[0]):
        total += row[t]
    return top, total
