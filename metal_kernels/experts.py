"""Products of activations with the weights of a mixture's experts, each row with the expert that was chosen for it."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from metal_kernels import reference
from metal_kernels.cpu.arrays import rows_float32, view
from metal_kernels.dispatch import kernel_backend, record
from metal_kernels.errors import ShapeError
from metal_kernels.gpu.experts import expert_product, stack
from metal_kernels.gpu.products import Gpu
from metal_kernels.hadamard import rotate
from metal_kernels.matmul import AffineWeight, DenseWeight, PackedWeight, Rows, tiles_of


class Experts:
    """The weights of one layer for every expert: all of one kind, shape and rotation.

    As a weight does, they stay with the backend that was active when they were made.
    """

    def __init__(self, weights: Sequence[PackedWeight] | Sequence[DenseWeight] | Sequence[AffineWeight]) -> None:
        self._weights: Sequence[PackedWeight | DenseWeight | AffineWeight] = weights
        self.shape = (len(weights), *weights[0].shape)
        self.nbytes = sum(weight.nbytes for weight in weights)
        tiles = [tile for tile in map(tiles_of, weights) if tile is not None]
        backend = kernel_backend("expert_matmul", gpu_fits=len(tiles) == len(weights))
        self._on_cpu, self._tiles = backend == "cpu", None
        if backend == "metal" or backend == "cuda":
            self._gpu: Gpu = backend
            self._tiles, self._weights = stack(tiles), []

    def times(self, x: mx.array, indices: mx.array, in_order: bool) -> mx.array:
        """See `expert_matmul`."""
        if self._tiles is not None:
            record(self._gpu, "expert_matmul")
            return expert_product(x, self._tiles, indices, in_order, self._gpu)
        record("cpu" if self._on_cpu else "reference", "expert_matmul")
        return self._cpu(x, indices) if self._on_cpu else self._reference(x, indices)

    def _cpu(self, x: mx.array, indices: mx.array) -> mx.array:
        """Each expert's rows at once; every row of x is prepared once, however many experts read it."""
        chosen: NDArray[np.int64] = view(indices).astype(np.int64)
        batch, per_batch = x.shape[:-2], x.shape[-2]
        rows = self._weights[0].prepare(rows_float32(x))
        sources = np.broadcast_to(np.arange(len(rows) // per_batch).reshape(batch), chosen.shape).reshape(-1)
        out = np.empty((chosen.size, per_batch, self.shape[1]), np.float32)
        flat = chosen.reshape(-1)
        for expert in np.unique(flat):
            places = np.flatnonzero(flat == expert)
            picked: Rows = rows.reshape(-1, per_batch, rows.shape[1])[sources[places]].reshape(-1, rows.shape[1])
            out[places] = self._weights[expert].product(picked).reshape(len(places), per_batch, -1)
        return mx.array(out).reshape(*indices.shape, per_batch, self.shape[1]).astype(x.dtype)

    def _reference(self, x: mx.array, indices: mx.array) -> mx.array:
        first = self._weights[0]
        turned = rotate(x, first.signs, first.block) if isinstance(first, PackedWeight) else x
        return reference.expert_matmul(turned, [weight.values(x.dtype) for weight in self._weights], indices)


def expert_matmul(x: mx.array, weight: Experts, indices: mx.array, in_order: bool = False) -> mx.array:
    """x (..., rows, width), not rotated, times the transposed weights (experts, out, width) that `indices` choose.

    indices, integers of any shape that the axes of x before the last two broadcast to; returns
    (*indices.shape, rows, out) in x's dtype, as `mx.gather_mm` would. in_order: the caller sorted the indices, so that
    a GPU can take all rows of one expert together. Raises ShapeError where shapes do not fit.
    """
    if x.ndim < 2 or x.shape[-1] != weight.shape[2]:
        raise ShapeError(
            f"activations of shape {x.shape} for experts of shape {weight.shape}; the last axis must be "
            f"{weight.shape[2]}"
        )
    try:
        fits = np.broadcast_shapes(x.shape[:-2], indices.shape) == tuple(indices.shape)
    except ValueError:
        fits = False
    if not fits:
        raise ShapeError(f"activations of shape {x.shape} for choices of shape {indices.shape}; they must broadcast")
    return weight.times(x, indices, in_order)
