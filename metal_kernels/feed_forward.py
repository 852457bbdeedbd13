"""A gated feed-forward layer in one step: two products and the activation between them."""

import mlx.core as mx
import numpy as np

from metal_kernels.activation import swiglu
from metal_kernels.cpu.activation import swiglu as cpu_swiglu
from metal_kernels.cpu.arrays import rows_float32
from metal_kernels.dispatch import kernel_backend, record
from metal_kernels.gpu.products import gated_product
from metal_kernels.matmul import Rows, Weight, matmul, rows_to_array, tiles_of


def feed_forward(x: mx.array, gate_up: Weight, down: Weight) -> mx.array:
    """(silu(x G^T) * (x U^T)) D^T for x (..., width); gate_up stacks G and U (inner, width), down is D (out, inner).

    Returns (..., out) in x's dtype. On a CPU nothing in between becomes an array of MLX, and on a GPU it is one call:
    either would cost more than the activation itself. Raises ShapeError where shapes do not fit.
    """
    first, second = tiles_of(gate_up), tiles_of(down)
    backend = kernel_backend("feed_forward", gpu_fits=first is not None and second is not None)
    if backend is None:
        gate, up = mx.split(matmul(x, gate_up), 2, axis=-1)
        return matmul(swiglu(gate, up), down)
    if first is not None and second is not None:
        return gated_product(x, first, second, "metal" if backend == "metal" else "cuda")
    record("cpu", gate_up.operation)
    record("cpu", down.operation)
    return rows_to_array(feed_forward_rows(rows_float32(x), gate_up, down), x)


def feed_forward_rows(rows: Rows, gate_up: Weight, down: Weight) -> Rows:
    """On a CPU: as `feed_forward`, for rows (n, width)."""
    both = gate_up.product(gate_up.prepare(rows))
    inner = both.shape[1] // 2
    gate, up = np.ascontiguousarray(both[:, :inner]), np.ascontiguousarray(both[:, inner:])
    return down.product(down.prepare(cpu_swiglu(gate, up)))
