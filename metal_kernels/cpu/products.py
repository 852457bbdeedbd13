"""Products on a CPU: few rows straight from the weights' bits, many rows through BLAS, a tile at a time."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from metal_kernels.cpu import integer_product
from metal_kernels.cpu.lanes import FIELDS, LEAST_ROWS, LaneWeight, lanes_for, padded_width
from metal_kernels.cpu.llvm_vector import available_lookups
from metal_kernels.cpu.vector import decode_packed, dot_dense, dot_packed

Rows = NDArray[np.float32]
FEW_ROWS = 8
"""Up to this many activation rows, each weight is decoded in registers for all of them."""
TILE_BYTES = 8 << 20
DENSE_KINDS = {np.dtype(np.uint16): 0, np.dtype(np.float16): 1, np.dtype(np.float32): 2}


def packed_product(x: Rows, weight: LaneWeight, lookup: int | None = None) -> Rows:
    """x (n, weight.padded), rotated and `in_lane_order`, times the transposed packed weight: (n, rows).

    lookup is one of `available_lookups`, the fastest by default; one row goes in integers where the processor can,
    if no other way is asked for.
    """
    if x.shape[0] == 1 and lookup is None and integer_product.fits(weight):
        return integer_product.integer_product(x, weight)
    n, way = x.shape[0], available_lookups()[-1] if lookup is None else lookup
    if n > FEW_ROWS:
        return _tiled(x, weight.rows, weight.padded, partial(_decode_packed, weight, way))
    columns, at_once = _shape_of(n)
    x, out = _buffers(x, columns, weight.codes.shape[0])
    kernel = _packed_kernel(weight.bits, weight.per_scale, at_once, columns, weight.lanes, way)
    kernel(weight.codes, weight.scales, weight.table, x, out)
    return out[:n, : weight.rows]


def pad_dense(weight: NDArray[Any]) -> NDArray[Any]:
    """A dense weight (rows, width) with rows and columns padded with zeros to what `dense_product` takes.

    Float32, float16, or bfloat16 as uint16 bits; returned as it is where it fits already.
    """
    rows, width = weight.shape
    padded = padded_width(width, lanes_for(width))
    if padded == width and rows >= LEAST_ROWS and weight.flags.c_contiguous:
        return weight
    out = np.zeros((max(rows, LEAST_ROWS), padded), weight.dtype)
    out[:rows, :width] = weight
    return out


def dense_product(x: Rows, weight: NDArray[Any], rows: int) -> Rows:
    """x (n, width) times the transposed padded weight (see `pad_dense`): (n, rows)."""
    n, width = x.shape
    if n > FEW_ROWS:
        if weight.dtype == np.float32:
            return x @ weight[:rows, :width].T
        kind = DENSE_KINDS[weight.dtype]
        return _tiled(x, rows, width, partial(_decode_dense, weight, kind))
    columns, at_once = _shape_of(n)
    if weight.shape[1] > width:
        x = np.pad(x, ((0, 0), (0, weight.shape[1] - width)))
    x, out = _buffers(x, columns, weight.shape[0])
    kind = DENSE_KINDS[weight.dtype]
    kernel = _dense_kernel(kind, at_once, columns, lanes_for(width))
    kernel(weight if kind != 1 else weight.view(np.uint16), x, out)
    return out[:n, :rows]


def affine_product(x: Rows, packed: NDArray[np.uint32], scales: Rows, biases: Rows, bits: int) -> Rows:
    """x (n, width) times the transposed affine weight: scales * code + biases, dense bit stream, (n, rows)."""
    return _tiled(x, packed.shape[0], x.shape[1], partial(_decode_affine, packed, scales, biases, bits))


def _tiled(x: Rows, rows: int, width: int, decode: Callable[[Rows, int], None]) -> Rows:
    """x times the transposed weight whose rows from `first` on `decode(tile, first)` writes, a tile at a time."""
    out = np.empty((x.shape[0], rows), np.float32)
    step = max(1, min(rows, TILE_BYTES // (4 * width)))
    tile = np.empty((step, width), np.float32)
    for first in range(0, rows, step):
        part = tile[: min(step, rows - first)]
        decode(part, first)
        np.matmul(x, part.T, out=out[:, first : first + step])
    return out


def _shape_of(n: int) -> tuple[int, int]:
    """(activation rows, weight rows) that one pass of a kernel takes for n activation rows."""
    return next((columns, at_once) for columns, at_once in ((1, 4), (2, 4), (4, 2), (8, 2)) if n <= columns)


def _buffers(x: Rows, columns: int, rows: int) -> tuple[Rows, Rows]:
    if x.shape[0] < columns:
        x = np.concatenate([x, np.zeros((columns - x.shape[0], x.shape[1]), np.float32)])
    return x, np.empty((columns, rows), np.float32)


@cache
def _packed_kernel(bits: int, per_scale: int, at_once: int, columns: int, lanes: int, lookup: int) -> Any:
    @njit(parallel=True, cache=True, nogil=True)
    def kernel(codes: Any, scales: Any, table: Any, x: Any, out: Any) -> None:
        rows = out.shape[1]
        for i in prange((rows + at_once - 1) // at_once):
            row = min(i * at_once, rows - at_once)
            dot_packed(
                codes.ctypes.data + row * codes.strides[0],
                codes.strides[0],
                scales.ctypes.data + row * scales.strides[0],
                scales.strides[0],
                table.ctypes.data,
                x.ctypes.data,
                x.strides[0],
                out.ctypes.data + row * 4,
                out.strides[0],
                codes.shape[1],
                bits,
                per_scale,
                at_once,
                columns,
                lanes,
                lookup,
            )

    return kernel


@cache
def _dense_kernel(kind: int, at_once: int, columns: int, lanes: int) -> Any:
    block = FIELDS * lanes

    @njit(parallel=True, cache=True, nogil=True)
    def kernel(weight: Any, x: Any, out: Any) -> None:
        rows = out.shape[1]
        for i in prange((rows + at_once - 1) // at_once):
            row = min(i * at_once, rows - at_once)
            dot_dense(
                weight.ctypes.data + row * weight.strides[0],
                weight.strides[0],
                x.ctypes.data,
                x.strides[0],
                out.ctypes.data + row * 4,
                out.strides[0],
                weight.shape[1] // block,
                kind,
                at_once,
                columns,
                lanes,
            )

    return kernel


def _decode_packed(weight: LaneWeight, lookup: int, tile: Rows, first: int) -> None:
    kernel = _decode_kernel(weight.bits, weight.per_scale, weight.lanes, lookup)
    kernel(weight.codes, weight.scales, weight.table, tile, first)


@cache
def _decode_kernel(bits: int, per_scale: int, lanes: int, lookup: int) -> Any:
    @njit(parallel=True, cache=True, nogil=True)
    def kernel(codes: Any, scales: Any, table: Any, tile: Any, first: Any) -> None:
        for i in prange(tile.shape[0]):
            row = first + i
            decode_packed(
                codes.ctypes.data + row * codes.strides[0],
                scales.ctypes.data + row * scales.strides[0],
                table.ctypes.data,
                tile.ctypes.data + i * tile.strides[0],
                codes.shape[1],
                bits,
                per_scale,
                lanes,
                lookup,
            )

    return kernel


def _decode_dense(weight: NDArray[Any], kind: int, tile: Rows, first: int) -> None:
    part = weight[first : first + tile.shape[0], : tile.shape[1]]
    if kind == 1:
        tile[:] = part
    else:
        _widen(part, tile.view(np.uint32))


@njit(parallel=True, cache=True, nogil=True)
def _widen(part: Any, tile: Any) -> None:
    for i in prange(tile.shape[0]):
        for j in range(tile.shape[1]):
            tile[i, j] = np.uint32(part[i, j]) << np.uint32(16)


@njit(parallel=True, cache=True, nogil=True)
def _decode_affine(packed: Any, scales: Any, biases: Any, bits: Any, tile: Any, first: Any) -> None:
    group = tile.shape[1] // scales.shape[1]
    mask = np.uint32((1 << bits) - 1)
    for i in prange(tile.shape[0]):
        row = first + i
        for g in range(scales.shape[1]):
            scale, bias = scales[row, g], biases[row, g]
            for j in range(g * group, (g + 1) * group):
                bit = j * bits
                word, shift = bit >> 5, bit & 31
                code = packed[row, word] >> np.uint32(shift)
                if shift + bits > 32:
                    code |= packed[row, word + 1] << np.uint32(32 - shift)
                tile[i, j] = scale * np.float32(code & mask) + bias
