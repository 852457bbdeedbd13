"""Gated activations."""

import mlx.core as mx

from metal_kernels.cpu.activation import swiglu as cpu_swiglu
from metal_kernels.cpu.arrays import rows_float32
from metal_kernels.dispatch import has_kernel
from metal_kernels.errors import ShapeError


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up of two arrays of one shape; in gate's dtype. Raises ShapeError where the shapes differ."""
    if gate.shape != up.shape:
        raise ShapeError(f"a gate of shape {gate.shape} and an input of {up.shape}; they must be the same")
    if has_kernel("swiglu"):
        mx.eval(gate, up)
        return mx.array(cpu_swiglu(rows_float32(gate), rows_float32(up))).reshape(gate.shape).astype(gate.dtype)
    return gate * mx.sigmoid(gate) * up
