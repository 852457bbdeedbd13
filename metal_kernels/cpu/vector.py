"""LLVM vector code that numba's auto-vectoriser does not find: table look-up in registers, packed fields.

Weights lie in lane blocks: a row is cut into blocks of LANES runs of 32 values, and a block of b-bit codes is b
vectors of LANES 32-bit words. Lane l holds run l, its value f in field f. So a group's values never leave their lanes,
and a block's scales are one vector; activations are brought into the order of fields and lanes before. Even fields
lie in the lower halves of words, odd ones in the upper, from their lowest bit on, as many as go: 16-bit lanes hold
whole codes too. Of 3 bits that is five fields a half, and the last two are made of the bit that each half of the
three words has left.
"""

import functools
from collections.abc import Iterator
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from metal_kernels.cpu.llvm_vector import (
    F16,
    F32,
    I16,
    I32,
    I64,
    constant,
    filled,
    fma,
    literals,
    load,
    load_table,
    look_up,
    prefetch,
    splat,
    store,
    sum_lanes,
    vector_of,
)  # fmt: skip

FIELDS = 32
KINDS = {0: I16, 1: F16, 2: F32}
"""Element types of dense weights: 0 bfloat16 (as its 16 bits), 1 float16, 2 float32."""


def codes_of(builder: ir.IRBuilder, words: list[ir.Value], bits: int) -> Iterator[ir.Value]:
    """Index vectors, right in their low `bits` bits only: one a field of 32-bit words, one a pair of 16-bit words."""
    halves, per_half = range(0, words[0].type.element.width, 16), 16 // bits
    for place in range(per_half * bits):
        for start in halves:
            yield _shifted(builder, words[place // per_half], start + bits * (place % per_half))
    for start in halves if bits == 3 else ():
        yield _gathered(builder, words, start + 15)


def _shifted(builder: ir.IRBuilder, word: ir.Value, by: int) -> ir.Value:
    return builder.lshr(word, filled(word.type, by)) if by else word


def _gathered(builder: ir.IRBuilder, words: list[ir.Value], top: int) -> ir.Value:
    """The code whose bit i is bit `top` of word i."""
    bits = [builder.and_(_shifted(builder, word, top - i), filled(word.type, 1 << i)) for i, word in enumerate(words)]
    return functools.reduce(builder.or_, bits)


def _packed_values(
    builder: ir.IRBuilder, address: ir.Value, table: list[ir.Value], bits: int, lanes: int, lookup: int
) -> Iterator[ir.Value]:
    words = [load(builder, address, vector_of(I32, lanes), 4 * lanes * w) for w in range(bits)]
    for index in codes_of(builder, words, bits):
        yield look_up(builder, index, table, lanes, lookup)


def _dense_values(builder: ir.IRBuilder, address: ir.Value, kind: int, lanes: int) -> Iterator[ir.Value]:
    element, size = KINDS[kind], 4 if kind == 2 else 2
    for field in range(FIELDS):
        raw = load(builder, address, vector_of(element, lanes), size * lanes * field)
        if kind == 0:
            wide = builder.shl(builder.zext(raw, vector_of(I32, lanes)), constant(16, lanes))
            yield builder.bitcast(wide, vector_of(F32, lanes))
        else:
            yield builder.fpext(raw, vector_of(F32, lanes)) if kind == 1 else raw


def block_scales(builder: ir.IRBuilder, address: ir.Value, per_scale: int, lanes: int) -> ir.Value:
    """The float16 scales of a block's lanes as float32, per_scale lanes to each."""
    count = lanes // per_scale
    scales = builder.fpext(load(builder, address, vector_of(F16, count), 0), vector_of(F32, count))
    return builder.shuffle_vector(
        scales, scales, ir.Constant(vector_of(I32, lanes), [lane // per_scale for lane in range(lanes)])
    )


@intrinsic(prefer_literal=True)
def dot_packed(
    typing: Any,
    weights: Any,
    weight_stride: Any,
    scales: Any,
    scale_stride: Any,
    table: Any,
    x: Any,
    x_stride: Any,
    out: Any,
    out_stride: Any,
    blocks: Any,
    bits: Any,
    per_scale: Any,
    rows: Any,
    columns: Any,
    lanes: Any,
    lookup: Any,
) -> Any:
    """out[c, r] = sum of table[code[r]] * scale[r] * x[c] for `rows` weight rows and `columns` activations.

    Addresses and strides are in bytes. bits 2 to 4, per_scale lanes to a scale (0: one scale a row, applied at the
    end), rows, columns, lanes and lookup are literals.
    """
    literal = literals(bits, per_scale, rows, columns, lanes, lookup)
    if literal is None:
        return None
    n_bits, per, n_rows, n_columns, n_lanes, way = literal

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        w, w_stride, s, s_stride, t, xs, xs_stride, o, o_stride, n = args[:10]
        lookup_table = load_table(builder, t, n_lanes)
        zero = filled(vector_of(F32, n_lanes), 0.0)
        totals = [[cgutils.alloca_once_value(builder, zero) for _ in range(n_columns)] for _ in range(n_rows)]
        block_bytes, x_bytes = 4 * n_lanes * n_bits, 4 * n_lanes * FIELDS
        scale_bytes = 2 * (n_lanes // per) if per else 0
        with cgutils.for_range(builder, n, intp=I64) as loop:
            x_block = builder.add(xs, builder.mul(loop.index, I64(x_bytes)))
            x_at = [builder.add(x_block, builder.mul(xs_stride, I64(c))) for c in range(n_columns)]
            w_block = builder.add(w, builder.mul(loop.index, I64(block_bytes)))
            s_block = builder.add(s, builder.mul(loop.index, I64(scale_bytes)))
            ahead = builder.add(w_block, builder.mul(w_stride, I64(n_rows)))
            for r in range(n_rows):  # the next rows: hardware does not foresee short rows that are read side by side
                prefetch(builder, builder.add(ahead, builder.mul(w_stride, I64(r))), block_bytes)
            streams = [
                _packed_values(
                    builder, builder.add(w_block, builder.mul(w_stride, I64(r))), lookup_table, n_bits, n_lanes, way
                )
                for r in range(n_rows)
            ]
            before = [[builder.load(total) for total in row] for row in totals]
            sums = [[zero] * n_columns for _ in range(n_rows)] if per else before
            for field in range(FIELDS):
                inputs = [
                    load(builder, x_at[c], vector_of(F32, n_lanes), 4 * n_lanes * field) for c in range(n_columns)
                ]
                for r in range(n_rows):
                    value = next(streams[r])
                    sums[r] = [fma(builder, value, inputs[c], sums[r][c]) for c in range(n_columns)]
            for r in range(n_rows):
                if per:
                    scale = block_scales(builder, builder.add(s_block, builder.mul(s_stride, I64(r))), per, n_lanes)
                    sums[r] = [fma(builder, sums[r][c], scale, before[r][c]) for c in range(n_columns)]
                for c in range(n_columns):
                    builder.store(sums[r][c], totals[r][c])
        for r in range(n_rows):
            for c in range(n_columns):
                dot = sum_lanes(builder, builder.load(totals[r][c]), n_lanes)
                if not per:
                    place = builder.add(s, builder.mul(s_stride, I64(r)))
                    dot = builder.fmul(dot, builder.fpext(load(builder, place, F16, 0), F32))
                place = builder.add(builder.add(o, I64(4 * r)), builder.mul(o_stride, I64(c)))
                store(builder, dot, place)
        return context.get_dummy_value()

    ints = [types.intp] * 10
    return types.void(*ints, bits, per_scale, rows, columns, lanes, lookup), codegen


@intrinsic(prefer_literal=True)
def decode_packed(
    typing: Any,
    weights: Any,
    scales: Any,
    table: Any,
    out: Any,
    blocks: Any,
    bits: Any,
    per_scale: Any,
    lanes: Any,
    lookup: Any,
) -> Any:
    """Write a row of packed weights as float32 values, scale * table[code], in lane order; cp. `dot_packed`."""
    literal = literals(bits, per_scale, lanes, lookup)
    if literal is None:
        return None
    n_bits, per, n_lanes, way = literal

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        w, s, t, o, n = args[:5]
        lookup_table = load_table(builder, t, n_lanes)
        row_scale = None if per else splat(builder, builder.fpext(load(builder, s, F16, 0), F32), n_lanes)
        with cgutils.for_range(builder, n, intp=I64) as loop:
            out_block = builder.add(o, builder.mul(loop.index, I64(4 * n_lanes * FIELDS)))
            w_block = builder.add(w, builder.mul(loop.index, I64(4 * n_lanes * n_bits)))
            scale = row_scale
            if scale is None:
                place = builder.add(s, builder.mul(loop.index, I64(2 * (n_lanes // per))))
                scale = block_scales(builder, place, per, n_lanes)
            for field, value in enumerate(_packed_values(builder, w_block, lookup_table, n_bits, n_lanes, way)):
                place = builder.add(out_block, I64(4 * n_lanes * field))
                store(builder, builder.fmul(value, scale), place)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5, bits, per_scale, lanes, lookup), codegen


@intrinsic(prefer_literal=True)
def dot_dense(
    typing: Any,
    weights: Any,
    weight_stride: Any,
    x: Any,
    x_stride: Any,
    out: Any,
    out_stride: Any,
    blocks: Any,
    kind: Any,
    rows: Any,
    columns: Any,
    lanes: Any,
) -> Any:
    """out[c, r] = <weight[r], x[c]> over whole blocks of rows of `kind` (see KINDS); as in `dot_packed`."""
    literal = literals(kind, rows, columns, lanes)
    if literal is None:
        return None
    n_kind, n_rows, n_columns, n_lanes = literal

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        w, w_stride, xs, xs_stride, o, o_stride, n = args[:7]
        zero = filled(vector_of(F32, n_lanes), 0.0)
        totals = [[cgutils.alloca_once_value(builder, zero) for _ in range(n_columns)] for _ in range(n_rows)]
        block_bytes, ahead = (4 if n_kind == 2 else 2) * n_lanes * FIELDS, builder.mul(w_stride, I64(n_rows))
        with cgutils.for_range(builder, n, intp=I64) as loop:
            x_block = builder.add(xs, builder.mul(loop.index, I64(4 * n_lanes * FIELDS)))
            x_at = [builder.add(x_block, builder.mul(xs_stride, I64(c))) for c in range(n_columns)]
            w_block = builder.add(w, builder.mul(loop.index, I64(block_bytes)))
            rows_at = [builder.add(w_block, builder.mul(w_stride, I64(r))) for r in range(n_rows)]
            for place in rows_at:
                prefetch(builder, builder.add(place, ahead), block_bytes)
            streams = [_dense_values(builder, place, n_kind, n_lanes) for place in rows_at]
            sums = [[builder.load(totals[r][c]) for c in range(n_columns)] for r in range(n_rows)]
            for field in range(FIELDS):
                inputs = [
                    load(builder, x_at[c], vector_of(F32, n_lanes), 4 * n_lanes * field) for c in range(n_columns)
                ]
                for r in range(n_rows):
                    value = next(streams[r])
                    sums[r] = [fma(builder, value, inputs[c], sums[r][c]) for c in range(n_columns)]
            for r in range(n_rows):
                for c in range(n_columns):
                    builder.store(sums[r][c], totals[r][c])
        for r in range(n_rows):
            for c in range(n_columns):
                dot = sum_lanes(builder, builder.load(totals[r][c]), n_lanes)
                place = builder.add(builder.add(o, I64(4 * r)), builder.mul(o_stride, I64(c)))
                store(builder, dot, place)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 7, kind, rows, columns, lanes), codegen


@intrinsic
def hadamard16(typing: Any, source: Any, signs: Any, target: Any, norm: Any, runs: Any) -> Any:
    """target = H_16 (source * signs * norm) for `runs` consecutive runs of 16 float32, by address."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        x, s, y, factor, n = args
        v = vector_of(F32, 16)
        scale = splat(builder, factor, 16)
        with cgutils.for_range(builder, n, intp=I64) as loop:
            at = builder.mul(loop.index, I64(64))
            value = builder.fmul(load(builder, builder.add(x, at), v, 0), load(builder, builder.add(s, at), v, 0))
            value = builder.fmul(value, scale)
            for step in (1, 2, 4, 8):
                swapped = builder.shuffle_vector(
                    value, value, ir.Constant(vector_of(I32, 16), [i ^ step for i in range(16)])
                )
                own = ir.Constant(v, [-1.0 if i & step else 1.0 for i in range(16)])
                value = fma(builder, value, own, swapped)
            store(builder, value, builder.add(y, at))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, types.float32, types.intp), codegen
