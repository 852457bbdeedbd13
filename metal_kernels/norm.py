"""Normalisation of rows."""

import mlx.core as mx
import numpy as np

from metal_kernels.cpu.arrays import rows_float32, view
from metal_kernels.cpu.norm import rms_rows
from metal_kernels.dispatch import has_kernel
from metal_kernels.errors import ShapeError


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis of x (..., width), weight (width,); in x's dtype.

    Raises ShapeError where the widths differ.
    """
    if weight.shape != x.shape[-1:]:
        raise ShapeError(f"a norm's weight of shape {weight.shape} for activations of shape {x.shape}")
    if has_kernel("rms_norm"):
        rows = rms_rows(rows_float32(x), view(weight.astype(mx.float32)), np.float32(eps))
        return mx.array(rows.reshape(x.shape)).astype(x.dtype)
    return mx.fast.rms_norm(x, weight, eps)
