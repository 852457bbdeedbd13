"""Weights and the products of activations with them: packed, dense and affine.

A weight object is built once from its tensors and holds them in the form of the backend that was active then.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from metal_kernels import reference
from metal_kernels.cpu.arrays import rows_float32, view
from metal_kernels.cpu.hadamard import rotate_rows
from metal_kernels.cpu.lanes import LaneWeight, arrange, in_lane_order, restore
from metal_kernels.cpu.products import affine_product, dense_product, packed_product, pad_dense
from metal_kernels.dispatch import active_backend, has_kernel, kernel_backend, record
from metal_kernels.errors import ShapeError
from metal_kernels.gpu.products import Gpu, fits, product
from metal_kernels.gpu.tiles import TileWeight
from metal_kernels.gpu.tiles import arrange as arrange_tiles
from metal_kernels.gpu.tiles import restore as restore_tiles
from metal_kernels.hadamard import check_rotation, rotate, unrotate
from metal_kernels.layout import bits_of, groups, words

Rows = NDArray[np.float32]


class PackedWeight:
    """A quantized matrix (out, width) and the rotation of its inputs.

    packed uint32 (out, width * bits / 32), scales float16 (out, groups), codebook of 2^bits ascending values,
    signs (width,) of +-1 or None, block the Hadamard size (1: none). Raises ShapeError where these do not fit.
    The codes are laid out for a CPU's vector registers or a GPU's matrix units, and the given arrays are not kept.
    """

    operation = "matmul"

    def __init__(
        self, packed: mx.array, scales: mx.array, codebook: tuple[float, ...], signs: mx.array | None, block: int
    ) -> None:
        self.codebook, self.block = codebook, block
        self.bits = bits_of(codebook)
        self.shape = (packed.shape[0], packed.shape[1] * 32 // self.bits)
        self.signs = signs
        self._check(packed, scales)
        self.nbytes = packed.nbytes + scales.nbytes
        self._lanes: LaneWeight | None = None
        self._tiles: TileWeight | None = None
        self._canonical: tuple[mx.array, mx.array] | None = None
        backend = kernel_backend("matmul", gpu_fits=fits(codebook, block))
        if backend == "cpu":
            self._lanes = arrange(view(packed), view(scales), codebook)
            self._signs = None if signs is None else view(signs.astype(mx.float32)).copy()
        elif backend == "metal" or backend == "cuda":
            self._gpu: Gpu = backend
            self._tiles = arrange_tiles(packed, scales, codebook, backend, signs, block)
        else:
            self._canonical = packed, scales

    def _check(self, packed: mx.array, scales: mx.array) -> None:
        rows, width = self.shape
        if packed.dtype != mx.uint32 or packed.shape[1] != words(width, self.bits):
            raise ShapeError(
                f"packed codes of shape {packed.shape} and {packed.dtype}; they must be uint32 words of "
                f"whole rows of {self.bits}-bit codes"
            )
        if scales.dtype != mx.float16 or scales.shape[0] != rows or width % scales.shape[1]:
            raise ShapeError(
                f"scales of shape {scales.shape} and {scales.dtype} for a {rows} x {width} matrix; they "
                "must be float16, a whole number of groups a row"
            )
        group = width // groups(width, width // scales.shape[1])
        if scales.shape[1] > 1 and group not in (32, 64, 128):
            raise ShapeError(f"groups of {group}; they must be of 32, 64 or 128 values, or one a row")
        check_rotation(width, self.signs, self.block)

    def canonical(self) -> tuple[mx.array, mx.array]:
        """(packed, scales) in the layout of the file."""
        if self._canonical is not None:
            return self._canonical
        if self._tiles is not None:
            return restore_tiles(self._tiles)
        assert self._lanes is not None
        packed, scales = restore(self._lanes)
        return mx.array(packed), mx.array(scales)

    def values(self, dtype: mx.Dtype) -> mx.array:
        """The rotated matrix (out, width) that the codes stand for."""
        return reference.dequantize(*self.canonical(), self.codebook, dtype)

    def times(self, x: mx.array) -> mx.array:
        """See `matmul`."""
        if self._tiles is not None:
            record(self._gpu, "matmul")
            return product(x, self._tiles, self._gpu)
        if self._canonical is not None:
            record("reference", "matmul")
            return reference.matmul(rotate(x, self.signs, self.block), *self._canonical, self.codebook)
        record("cpu", "matmul")
        return rows_to_array(self.product(self.prepare(rows_float32(x))), x)

    def take(self, rows: mx.array) -> mx.array:
        """See `embed`."""
        packed, scales = self._take(rows.reshape(-1))
        chosen = reference.dequantize(packed, scales, self.codebook)
        return unrotate(chosen.reshape(*rows.shape, self.shape[1]), self.signs, self.block)

    def _take(self, rows: mx.array) -> tuple[mx.array, mx.array]:
        """(packed, scales) of rows (n,) in the layout of the file."""
        if self._canonical is not None:
            packed, scales = self._canonical
            return packed[rows], scales[rows]
        if self._tiles is not None:
            return self._tiles.take(rows)
        assert self._lanes is not None
        packed, scales = restore(self._lanes.take(view(rows)))
        return mx.array(packed), mx.array(scales)

    @property
    def tiles(self) -> TileWeight | None:
        """The layout for GPU kernels; None where another backend has the weight."""
        return self._tiles

    def prepare(self, rows: Rows) -> Rows:
        """On a CPU: rows (n, width) of activations, rotated, padded and in lane order, as `product` takes them."""
        assert self._lanes is not None
        return in_lane_order(rotate_rows(rows, self._signs, self.block, self._lanes.padded), self._lanes.lanes)

    def product(self, prepared: Rows) -> Rows:
        """On a CPU: (n, out) of what `prepare` returned."""
        assert self._lanes is not None
        return packed_product(prepared, self._lanes)


class DenseWeight:
    """A matrix (out, width) in float32, float16 or bfloat16, multiplied in the activations' precision."""

    operation = "dense"

    def __init__(self, weight: mx.array) -> None:
        self.shape = weight.shape
        self.nbytes = weight.nbytes
        self._weight = weight
        self._padded: NDArray[Any] | None = None
        if has_kernel("dense"):
            self._padded = pad_dense(view(weight))

    def values(self, dtype: mx.Dtype) -> mx.array:
        """The matrix (out, width)."""
        return self._weight.astype(dtype)

    def take(self, rows: mx.array) -> mx.array:
        """See `embed`."""
        return self._weight[rows]

    def times(self, x: mx.array) -> mx.array:
        """x (..., width) times the transposed weight: (..., out) in x's dtype."""
        if self._padded is None:
            record("reference", "dense")
            return x @ self._weight.T
        record("cpu", "dense")
        return rows_to_array(self.product(rows_float32(x)), x)

    def prepare(self, rows: Rows) -> Rows:
        """On a CPU: rows (n, width) of activations as `product` takes them: as they are."""
        return rows

    def product(self, prepared: Rows) -> Rows:
        """On a CPU: (n, out)."""
        assert self._padded is not None
        return dense_product(prepared, self._padded, self.shape[0])


class AffineWeight:
    """A matrix as `mx.quantize` packs it: codes, scales and biases of groups."""

    operation = "affine"

    def __init__(self, packed: mx.array, scales: mx.array, biases: mx.array, bits: int, group_size: int) -> None:
        self.bits, self.group_size = bits, group_size
        self.shape = (packed.shape[0], packed.shape[1] * 32 // bits)
        self.nbytes = packed.nbytes + scales.nbytes + biases.nbytes
        self._arrays = (packed, scales, biases)

    def values(self, dtype: mx.Dtype) -> mx.array:
        """The matrix (out, width) that the codes stand for."""
        return mx.dequantize(*self._arrays, group_size=self.group_size, bits=self.bits).astype(dtype)

    def times(self, x: mx.array) -> mx.array:
        """x (..., width) times the transposed weight: (..., out) in x's dtype."""
        if not has_kernel("affine"):
            return mx.quantized_matmul(x, *self._arrays, transpose=True, group_size=self.group_size, bits=self.bits)
        return rows_to_array(self.product(rows_float32(x)), x)

    def prepare(self, rows: Rows) -> Rows:
        """On a CPU: rows (n, width) of activations as `product` takes them: as they are."""
        return rows

    def product(self, prepared: Rows) -> Rows:
        """On a CPU: (n, out)."""
        packed, scales, biases = (view(a if a.dtype == mx.uint32 else a.astype(mx.float32)) for a in self._arrays)
        return affine_product(prepared, packed, scales, biases, self.bits)


Weight = PackedWeight | DenseWeight | AffineWeight


def tiles_of(weight: Weight) -> TileWeight | None:
    """The weight's layout for GPU kernels; None where it has none."""
    return weight.tiles if isinstance(weight, PackedWeight) else None


def matmul(x: mx.array, weight: Weight) -> mx.array:
    """x (..., width), not rotated, times the transposed weight (out, width): (..., out) in x's dtype.

    Raises ShapeError where the widths differ.
    """
    if x.shape[-1] != weight.shape[1]:
        raise ShapeError(
            f"activations of shape {x.shape} for a weight of shape {weight.shape}; the last axis must be "
            f"{weight.shape[1]}"
        )
    return weight.times(x)


def embed(tokens: mx.array, weight: DenseWeight | PackedWeight) -> mx.array:
    """Rows of a weight (out, width), in the original domain, that `tokens`, integers of any shape, choose.

    Returns (*tokens.shape, width), float32 for packed weights, otherwise in the weight's dtype.
    """
    return weight.take(tokens)


def split(y: mx.array, ends: Sequence[int]) -> list[mx.array]:
    """The parts of y's last axis between `ends`, as `mx.split` gives them.

    On a CPU they are copied at once: evaluating a slice later costs more than copying it now.
    """
    if active_backend() != "cpu" or y.dtype == mx.bfloat16:
        return y.split(tuple(ends), axis=-1)
    return [mx.array(part) for part in np.split(view(y), list(ends), axis=-1)]


def rows_to_array(rows: Rows, x: mx.array) -> mx.array:
    """Rows (n, out) as an array of x's dtype, with x's axes but the last."""
    return mx.array(rows.reshape(*x.shape[:-1], rows.shape[-1])).astype(x.dtype)
