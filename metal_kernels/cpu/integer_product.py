"""The product of one vector in 16-bit integers, on processors with 512-bit registers of 16-bit lanes (AVX512VNNI).

A register then holds 32 codes instead of 16, so that shifts and look-ups, which share one of the processor's ports,
are half as many. Tables are rounded to 13 bits; activations so that the 32 products of a lane add up in 32 bits.
"""

from collections.abc import Iterator
from functools import cache, partial, reduce
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
    call,
    constant,
    filled,
    fma,
    literals,
    load,
    prefetch,
    splat,
    store,
    sum_lanes,
    vector_of,
)  # fmt: skip
from metal_kernels.cpu.vector import block_scales, codes_of

LANES = 16
WIDE = vector_of(I16, 2 * LANES)
AT_ONCE = 2
"""Weight rows that share loads of activations."""
AHEAD = 4
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
    largest, sizes = np.abs(entries).max(), np.arange(TABLE_MOST // 2, TABLE_MOST + 1)
    scaled = entries / largest * sizes[:, None]
    best = int(np.argmin(np.square((scaled - np.rint(scaled)) / sizes[:, None]).sum(axis=1)))
    return np.tile(np.rint(scaled[best]), 2).astype(np.int16), np.float32(largest / sizes[best])


@cache
def _kernel(bits: int, per_scale: int) -> Any:
    @njit(parallel=True, cache=True, nogil=True)
    def kernel(codes: Any, scales: Any, table: Any, one: Any, x: Any, out: Any) -> None:
        integers = np.empty((x.shape[0], FIELDS // 2, LANES), np.int32)
        units = np.empty((x.shape[0], LANES), np.float32)
        round_lanes(x.ctypes.data, one, integers.ctypes.data, units.ctypes.data, x.shape[0])
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


@intrinsic
def round_lanes(typing: Any, x: Any, one: Any, integers: Any, units: Any, blocks: Any) -> Any:
    """Activations, float32 (blocks, fields, lanes), as pairs of int16, an even field in the lower half of an int32.

    By address: integers (blocks, fields / 2, lanes); units float32 (blocks, lanes): what 1 of a lane, times `one`, is
    worth, NaN where the lane holds an infinity or NaN.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        xs, one, target, us, n = args
        v = vector_of(F32, LANES)
        number = partial(filled, v)
        with cgutils.for_range(builder, n, intp=I64) as loop:
            place = builder.add(xs, builder.mul(loop.index, I64(4 * LANES * FIELDS)))
            fields = [load(builder, place, v, 4 * LANES * field) for field in range(FIELDS)]
            sizes = [call(builder, "llvm.fabs.v16f32", v, field) for field in fields]
            total = reduce(builder.fadd, sizes)
            most = reduce(partial(_larger, builder), sizes)
            unit = _larger(
                builder, builder.fmul(most, number(1 / INPUT_MOST)), builder.fmul(total, number(1 / SUM_MOST))
            )
            usual = builder.and_(
                builder.fcmp_ordered(">=", total, number(LEAST)), builder.fcmp_ordered("<", total, number(np.inf))
            )
            factor = builder.select(usual, builder.fdiv(number(1.0), unit), number(0.0))
            spoilt = builder.fsub(total, total)  # 0, or NaN
            worth = builder.fadd(builder.fmul(unit, splat(builder, one, LANES)), spoilt)
            store(builder, worth, builder.add(us, builder.mul(loop.index, I64(4 * LANES))))
            out = builder.add(target, builder.mul(loop.index, I64(2 * LANES * FIELDS)))
            whole = [_whole(builder, builder.fmul(field, factor)) for field in fields]
            for pair, (low, high) in enumerate(zip(whole[::2], whole[1::2], strict=True)):
                lower = builder.and_(low, constant(0xFFFF, LANES))
                upper = builder.shl(high, constant(16, LANES))
                store(builder, builder.or_(lower, upper), builder.add(out, I64(4 * LANES * pair)))
        return context.get_dummy_value()

    return types.void(types.intp, types.float32, *[types.intp] * 3), codegen


def _larger(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _whole(builder: ir.IRBuilder, values: ir.Value) -> ir.Value:
    """float32 rounded to int32; infinities and NaN give some number."""
    zero, all_lanes, nearest = constant(0, LANES), I16(-1), I32(4)
    return call(builder, "llvm.x86.avx512.mask.cvtps2dq.512", zero.type, values, zero, all_lanes, nearest)


def _row_values(builder: ir.IRBuilder, address: ir.Value, table: ir.Value, bits: int) -> Iterator[ir.Value]:
    """The 16 pairs of fields of a block, looked up."""
    words = [load(builder, address, WIDE, 4 * LANES * i) for i in range(bits)]
    for index in codes_of(builder, words, bits):
        yield call(builder, "llvm.x86.avx512.permvar.hi.512", WIDE, table, index)


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
    """out[r] = sum of table[code[r]] * x * scale[r] * unit for AT_ONCE rows; x and units as of `round_lanes`.

    Addresses and strides are in bytes; bits and per_scale, as in `LaneWeight`, are literals.
    """
    literal = literals(bits, per_scale)
    if literal is None:
        return None
    n_bits, per = literal

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        w, w_stride, s, s_stride, t, xs, us, o, n = args[:9]
        entries = load(builder, t, WIDE, 0)
        zero = filled(vector_of(F32, LANES), 0.0)
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
            sums: list[ir.Value] = [constant(0, LANES)] * AT_ONCE
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
