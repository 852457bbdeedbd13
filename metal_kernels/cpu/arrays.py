"""Zero-copy passage between MLX arrays and NumPy views."""

from typing import Any, cast

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray


def view(x: mx.array) -> NDArray[Any]:
    """A NumPy view of x, evaluated first; bfloat16 comes as the uint16 of its bits. Writing to it writes to x."""
    return cast(NDArray[Any], np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x, copy=False))


def rows_float32(x: mx.array) -> NDArray[np.float32]:
    """x (..., width) as float32 rows (n, width), each contiguous; a view where x is float32 already."""
    rows = view(x.astype(mx.float32)).reshape(-1, x.shape[-1])
    return np.ascontiguousarray(rows)
