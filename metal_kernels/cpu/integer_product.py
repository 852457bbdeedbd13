"""The product of one vector in 16-bit integers, on processors with 512-bit registers of 16-bit lanes (AVX512VNNI).

A register then holds 32 codes instead of 16, so that shifts and look-ups, which share one of the processor's ports,
are half as many. Tables are rounded to 13 bits; activations so that the 32 products of a lane add up in 32 bits.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import njit, prange
from numba.core import cgutils, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from metal_kernels.cpu.lanes import FIELDS, LaneWeight
from metal_kernels.cpu.llvm_vector import (
    F16,
    F32,
    I16,
    I32,
    I64,
    fma,
    literals,
    load,
    prefetch,
    store,
    sum_lanes,
    vector_of,
)  # fmt: skip
from metal_kernels.cpu.vector import block_scales, gathered

LANES = 16
WIDE = vector_of(I16, 2 * LANES)
AT_ONCE = 4
"""Weight rows that share loads of activations."""
AHEAD = 2
"""So many times as many rows ahead, codes are asked for: hardware does not foresee rows that are read side by side."""
TABLE_MOST, INPUT_MOST = 2**13, 2**15 - 1
SUM_MOST = 2**31 / TABLE_MOST - 2 * FIELDS
"""A lane's activations add up to no more, by magnitude, with room for their rounding."""
LEAST = 2.0**-100
"""Lanes of smaller activations count as zeros."""


@cache
def _has_instructions() -> bool:
    features = llvm.get_host_cpu_features()
    return all(features.get(name) for name in ("avx512bw", "avx512vnni"))


def fits(weight: LaneWeight) -> bool:
    """Whether this processor can multiply such a weight in 16-bit integers."""
    return _has_instructions() and weight.lanes == LANES


def integer_product(x: NDArray[np.float32], weight: LaneWeight) -> NDArray[np.float32]:
    """x (1, weight.padded), rotated and `in_lane_order`, times the transposed packed weight that `fits`: (1, rows).

    An infinity or NaN in x makes all results NaN.
    """
    out = np.empty((1, weight.codes.shape[0]), np.float32)
    kernel = _kernel(weight.bits, weight.per_scale)
    table, one = integer_table(weight.table.tobytes())
    kernel(weight.codes, weight.scales, table, one, x.reshape(-1, FIELDS, LANES), out.reshape(-1))
    return out[:, : weight.rows]


@cache
def integer_table(table: bytes) -> tuple[NDArray[np.int16], np.float32]:
    """A float32 table (16,) as int16 (32,), repeated, and what 1 of them is worth.

    Of all sizes of the largest entry, from half of the room up, the one at which the others are nearest to integers.
    """
    entries = np.frombuffer(table, np.float32).astype(np.float64)
    largest = np.abs(entries).max()
    scaled = entries / largest * np.arange(TABLE_MOST // 2, TABLE_MOST + 1)[:, None]
    errors = np.square(scaled / scaled.max(1, keepdims=True) - np.rint(scaled) / scaled.max(1, keepdims=True)).sum(1)
    best = scaled[int(np.argmin(errors))]
    return np.tile(np.rint(best), 2).astype(np.int16), np.float32(largest / np.abs(best).max())


@cache
def _kernel(bits: int, per_scale: int) -> Any:
    @njit(parallel=True, cache=True, nogil=True)
    def kernel(codes: Any, scales: Any, table: Any, one: Any, x: Any, out: Any) -> None:
        integers = np.empty((x.shape[0], FIELDS // 2, LANES), np.int32)
        units = np.empty((x.shape[0], LANES), np.float32)
        _round_input(x, one, integers, units)
        rows = out.shape[0]
        for i in prange((rows + AT_ONCE - 1) // AT_ONCE):
            row = min(i * AT_ONCE, rows - AT_ONCE)
            dot_integers(
                codes.ctypes.data + row * codes.strides[0],
                codes.strides[0],
                scales.ctypes.data + row * scales.strides[0],
                scales.strides[0],
                table.ctypes.data,
                integers.ctypes.data,
                units.ctypes.data,
                out.ctypes.data + row * 4,
                codes.shape[1],
                bits,
                per_scale,
            )

    return kernel


@njit(cache=True, nogil=True)
def _round_input(x: Any, one: Any, integers: Any, units: Any) -> None:
    """Activations (blocks, fields, lanes) as pairs of int16 (blocks, fields / 2, lanes), even fields in the lower half.

    units (blocks, lanes) is what 1 of each lane, times `one`, is worth.
    """
    factors = np.empty(LANES, np.float32)
    for block in range(x.shape[0]):
        most, total = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
        for field in range(FIELDS):
            for lane in range(LANES):
                size = abs(x[block, field, lane])
                total[lane] += size
                most[lane] = max(most[lane], size)
        for lane in range(LANES):
            unit = max(most[lane] / np.float32(INPUT_MOST), total[lane] / np.float32(SUM_MOST))
            some = LEAST <= total[lane] < np.inf
            factors[lane] = np.float32(1.0) / unit if some else np.float32(0.0)
            units[block, lane] = unit * one + (total[lane] - total[lane])
        for pair in range(FIELDS // 2):
            for lane in range(LANES):
                low = np.int32(np.rint(x[block, 2 * pair, lane] * factors[lane]))
                high = np.int32(np.rint(x[block, 2 * pair + 1, lane] * factors[lane]))
                integers[block, pair, lane] = (low & np.int32(0xFFFF)) | (high << np.int32(16))


def _constant(value: int, lanes: int) -> ir.Value:
    return ir.Constant(vector_of(I16, lanes), [value] * lanes)


def _row_values(builder: ir.IRBuilder, address: ir.Value, table: ir.Value, bits: int) -> Iterator[ir.Value]:
    """The 16 pairs of fields of a block, looked up."""
    words = [load(builder, address, WIDE, 4 * LANES * i) for i in range(bits)]
    kind, per_word = ir.FunctionType(WIDE, [WIDE, WIDE]), 16 // bits
    permute = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.permvar.hi.512")
    for pair in range(per_word * bits):
        word, place = words[pair // per_word], pair % per_word
        index = builder.lshr(word, _constant(bits * place, 32)) if place else word
        yield builder.call(permute, [table, index])
    if bits == 3:
        yield builder.call(permute, [table, gathered(builder, words, 15, 32, _constant)])


def _add_products(builder: ir.IRBuilder, sums: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
    """sums (16 int32) plus the products of each pair of int16; as assembly, since LLVM makes two instructions of it."""
    llvm.initialize_native_asmparser()
    kind = ir.FunctionType(sums.type, [sums.type, WIDE, WIDE])
    return builder.call(ir.InlineAsm(kind, "vpdpwssd $3, $2, $0", "=v,0,v,v"), [sums, a, b])


@intrinsic(prefer_literal=True)
def dot_integers(
    typing: Any,
    weights: Any,
    weight_stride: Any,
    scales: Any,
    scale_stride: Any,
    table: Any,
    x: Any,
    units: Any,
    out: Any,
    blocks: Any,
    bits: Any,
    per_scale: Any,
) -> Any:
    """out[r] = sum of table[code[r]] * x * scale[r] * unit for AT_ONCE rows; x and units as of `_round_input`.

    Addresses and strides are in bytes; bits and per_scale, as in `LaneWeight`, are literals.
    """
    literal = literals(bits, per_scale)
    if literal is None:
        return None
    n_bits, per = literal

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        w, w_stride, s, s_stride, t, xs, us, o, n = args[:9]
        entries = load(builder, t, WIDE, 0)
        zero = ir.Constant(vector_of(F32, LANES), [0.0] * LANES)
        totals = [cgutils.alloca_once_value(builder, zero) for _ in range(AT_ONCE)]
        ahead = builder.mul(w_stride, I64(AHEAD * AT_ONCE))
        with cgutils.for_range(builder, n, intp=I64) as loop:
            x_block = builder.add(xs, builder.mul(loop.index, I64(2 * LANES * FIELDS)))
            unit = load(builder, builder.add(us, builder.mul(loop.index, I64(4 * LANES))), vector_of(F32, LANES), 0)
            w_block = builder.add(w, builder.mul(loop.index, I64(4 * LANES * n_bits)))
            streams: list[Iterator[ir.Value]] = []
            for r in range(AT_ONCE):
                row = builder.add(w_block, builder.mul(w_stride, I64(r)))
                prefetch(builder, builder.add(row, ahead), 4 * LANES * n_bits)
                streams.append(_row_values(builder, row, entries, n_bits))
            sums = [ir.Constant(vector_of(I32, LANES), [0] * LANES)] * AT_ONCE
            for pair in range(FIELDS // 2):
                inputs = load(builder, x_block, WIDE, 4 * LANES * pair)
                for r in range(AT_ONCE):
                    sums[r] = _add_products(builder, sums[r], next(streams[r]), inputs)
            for r in range(AT_ONCE):
                factor = unit
                if per:
                    place = builder.add(
                        builder.add(s, builder.mul(s_stride, I64(r))), builder.mul(loop.index, I64(2 * (LANES // per)))
                    )
                    factor = builder.fmul(unit, block_scales(builder, place, per, LANES))
                whole = builder.sitofp(sums[r], vector_of(F32, LANES))
                builder.store(fma(builder, whole, factor, builder.load(totals[r])), totals[r])
        for r in range(AT_ONCE):
            dot = sum_lanes(builder, builder.load(totals[r]), LANES)
            if not per:
                place = builder.add(s, builder.mul(s_stride, I64(r)))
                dot = builder.fmul(dot, builder.fpext(load(builder, place, F16, 0), F32))
            store(builder, dot, builder.add(o, I64(4 * r)))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 9, bits, per_scale), codegen
