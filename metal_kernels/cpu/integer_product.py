"""The product of one vector in 16-bit integers: where processors have 512-bit registers of 16-bit lanes (AVX512BW).

A register then holds 32 codes instead of 16, so that shifts and look-ups, which share one of the processor's ports,
are half as many. Activations are rounded to 15 bits of the largest of 64 (32 where scales are of 32), tables to 14
bits, and four products add up without overflow: 4 * 2^14 * (2^15 - 1) < 2^31.
"""

from collections.abc import Iterator
from functools import cache, reduce
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import get_num_threads, njit, prange
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
    splat,
    store,
    sum_lanes,
    vector_of,
)  # fmt: skip
from metal_kernels.cpu.vector import gathered

LANES = 16
WIDE = vector_of(I16, 2 * LANES)
AT_ONCE = 4
"""Weight rows that share loads of activations."""
TABLE_MOST, INPUT_MOST = 16384, 32767
LEAST = 2.0**-100
"""Groups of smaller activations count as zeros."""


@cache
def _has_16_bit_lanes() -> bool:
    return bool(llvm.get_host_cpu_features().get("avx512bw"))


def fits(weight: LaneWeight) -> bool:
    """Whether this processor can multiply such a weight in 16-bit integers."""
    return _has_16_bit_lanes() and weight.lanes == LANES and weight.per_scale != 1


def integer_product(x: NDArray[np.float32], weight: LaneWeight) -> NDArray[np.float32]:
    """x (1, weight.padded), rotated, times the transposed packed weight that `fits`: (1, rows).

    A group of activations that holds an infinity or NaN makes all results NaN.
    """
    out = np.empty((1, weight.codes.shape[0]), np.float32)
    fields = min(weight.per_scale or FIELDS, 4)
    kernel = _kernel(weight.bits, weight.per_scale, fields)
    table, one = integer_table(weight.table.tobytes())
    kernel(weight.codes, weight.scales, table, one, x.reshape(-1), out.reshape(-1), get_num_threads())
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
def _kernel(bits: int, per_scale: int, fields: int) -> Any:
    blocks_of = LANES * fields

    @njit(parallel=True, cache=True, nogil=True)
    def kernel(codes: Any, scales: Any, table: Any, one: Any, x: Any, out: Any, parts: Any) -> None:
        integers, units = np.empty(x.shape[0] // 2, np.int32), np.empty(x.shape[0] // blocks_of, np.float32)
        _integer_input(x, one, integers, units)
        runs = (out.shape[0] + AT_ONCE - 1) // AT_ONCE
        for part in prange(parts):
            factors = np.empty((AT_ONCE, units.shape[0]), np.float32)
            for i in range(part * runs // parts, (part + 1) * runs // parts):
                row = min(i * AT_ONCE, out.shape[0] - AT_ONCE)
                dot_integers(
                    codes.ctypes.data + row * codes.strides[0],
                    codes.strides[0],
                    scales.ctypes.data + row * scales.strides[0],
                    scales.strides[0],
                    table.ctypes.data,
                    integers.ctypes.data,
                    units.ctypes.data,
                    factors.ctypes.data,
                    out.ctypes.data + row * 4,
                    codes.shape[1],
                    bits,
                    per_scale,
                    fields,
                )

    return kernel


@njit(cache=True, nogil=True)
def _integer_input(x: Any, one: Any, integers: Any, units: Any) -> None:
    """Activations as pairs of int16, a field's and the next's, and what 1 in each group, times `one`, is worth."""
    group = x.shape[0] // units.shape[0]
    bits = x.view(np.int32)
    for g in range(units.shape[0]):
        most_bits = np.int32(0)
        for i in range(g * group, (g + 1) * group):
            most_bits = max(most_bits, bits[i] & np.int32(0x7FFFFFFF))
        units.view(np.int32)[g] = most_bits
        most, factor = units[g], np.float32(0.0)
        if LEAST <= most < np.inf:
            factor = np.float32(INPUT_MOST) / most
        units[g] = most / np.float32(INPUT_MOST) * one if most < np.inf else np.nan
        for start in range(g * group, (g + 1) * group, 2 * LANES):
            for lane in range(LANES):
                low = np.int32(np.rint(x[start + lane] * factor))
                high = np.int32(np.rint(x[start + LANES + lane] * factor))
                integers[start // 2 + lane] = (low & np.int32(0xFFFF)) | (high << np.int32(16))


def _constant(value: int, lanes: int) -> ir.Value:
    return ir.Constant(vector_of(I16, lanes), [value] * lanes)


def _values(builder: ir.IRBuilder, words: list[ir.Value], table: ir.Value, bits: int) -> Iterator[ir.Value]:
    """The 16 pairs of fields of a block, looked up."""
    kind, per_word = ir.FunctionType(WIDE, [WIDE, WIDE]), 16 // bits
    permute = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.permvar.hi.512")
    for pair in range(per_word * bits):
        word, place = words[pair // per_word], pair % per_word
        index = builder.lshr(word, _constant(bits * place, 32)) if place else word
        yield builder.call(permute, [table, index])
    if bits == 3:
        yield builder.call(permute, [table, gathered(builder, words, 15, 32, _constant)])


def _multiply_pairs(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    """Sums of two products in int32; LLVM makes one instruction of this and an addition where there is one."""
    kind = ir.FunctionType(vector_of(I32, LANES), [WIDE, WIDE])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.pmaddw.d.512"), [a, b])


def _write_factors(
    builder: ir.IRBuilder, scales: ir.Value, units: ir.Value, factors: ir.Value, blocks: ir.Value, per: tuple[int, int]
) -> None:
    """factors = scales * units; `per` is fields to a scale and to a unit."""
    scale_count, count = (FIELDS // fields for fields in per)
    order = ir.Constant(vector_of(I32, count), [i * scale_count // count for i in range(count)])
    with cgutils.for_range(builder, blocks, intp=I64) as loop:
        half = load(
            builder, builder.add(scales, builder.mul(loop.index, I64(2 * scale_count))), vector_of(F16, scale_count), 0
        )
        single = builder.fpext(half, vector_of(F32, scale_count))
        at = builder.mul(loop.index, I64(4 * count))
        unit = load(builder, builder.add(units, at), vector_of(F32, count), 0)
        spread = builder.shuffle_vector(single, single, order)
        store(builder, builder.fmul(spread, unit), builder.add(factors, at))


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
    factors: Any,
    out: Any,
    blocks: Any,
    bits: Any,
    per_scale: Any,
    fields: Any,
) -> Any:
    """out[r] = sum of table[code[r]] * x * scale[r] * unit for AT_ONCE rows, one unit to `fields` (2 or 4) fields.

    Addresses and strides are in bytes; bits, per_scale (as in `LaneWeight`) and fields are literals. `factors` has
    room for a float32 for every unit of every row.
    """
    literal = literals(bits, per_scale, fields)
    if literal is None:
        return None
    n_bits, n_per_scale, n_fields = literal

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        w, w_stride, s, s_stride, t, xs, us, fs, o, n = args[:10]
        units = FIELDS // n_fields
        scale_at = [builder.add(s, builder.mul(s_stride, I64(r))) for r in range(AT_ONCE)]
        factor_at = [us] * AT_ONCE
        if n_per_scale:
            f_stride = builder.mul(n, I64(4 * units))
            factor_at = [builder.add(fs, builder.mul(f_stride, I64(r))) for r in range(AT_ONCE)]
            for place, target in zip(scale_at, factor_at, strict=True):
                _write_factors(builder, place, us, target, n, (n_per_scale, n_fields))
        entries = load(builder, t, WIDE, 0)
        zero = ir.Constant(vector_of(F32, LANES), [0.0] * LANES)
        totals = [cgutils.alloca_once_value(builder, zero) for _ in range(AT_ONCE)]
        block_bytes = 4 * LANES * n_bits
        with cgutils.for_range(builder, n, intp=I64) as loop:
            x_block = builder.add(xs, builder.mul(loop.index, I64(2 * LANES * FIELDS)))
            f_offset = builder.mul(loop.index, I64(4 * units))
            w_block = builder.add(w, builder.mul(loop.index, I64(block_bytes)))
            rows = [builder.add(w_block, builder.mul(w_stride, I64(r))) for r in range(AT_ONCE)]
            ahead = builder.mul(w_stride, I64(AT_ONCE))
            streams: list[Iterator[ir.Value]] = []
            for row in rows:
                prefetch(builder, builder.add(row, ahead), block_bytes)
                words = [load(builder, row, WIDE, 4 * LANES * i) for i in range(n_bits)]
                streams.append(_values(builder, words, entries, n_bits))
            for unit in range(units):
                pairs = range(unit * n_fields // 2, (unit + 1) * n_fields // 2)
                inputs = [load(builder, x_block, WIDE, 4 * LANES * pair) for pair in pairs]
                for r in range(AT_ONCE):
                    products = [_multiply_pairs(builder, next(streams[r]), each) for each in inputs]
                    whole = builder.sitofp(reduce(builder.add, products), vector_of(F32, LANES))
                    factor = load(builder, builder.add(factor_at[r], f_offset), F32, 4 * unit)
                    total = builder.load(totals[r])
                    builder.store(fma(builder, whole, splat(builder, factor, LANES), total), totals[r])
        for r in range(AT_ONCE):
            dot = sum_lanes(builder, builder.load(totals[r]), LANES)
            if not n_per_scale:
                dot = builder.fmul(dot, builder.fpext(load(builder, scale_at[r], F16, 0), F32))
            store(builder, dot, builder.add(o, I64(4 * r)))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 10, bits, per_scale, fields), codegen
