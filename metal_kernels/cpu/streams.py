"""Streams of codes, low bits first, as a cache's tokens have them: sixteen values at a time."""

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from metal_kernels.cpu.llvm_vector import (
    F32,
    I32,
    I64,
    fma,
    literals,
    load,
    load_table,
    look_up,
    splat,
    store,
    vector_of,
)

LANES = 16


@intrinsic(prefer_literal=True)
def decode_stream(
    typing: Any, codes: Any, table: Any, scale: Any, out: Any, sixteens: Any, bits: Any, lookup: Any
) -> Any:
    """out[i] = table[code i] * scale for 16 * sixteens codes of 2 to 4 bits; arrays by address.

    table: float32, 16 of them, 4 or 8 values repeated. bits and lookup are literals.
    """
    literal = literals(bits, lookup)
    if literal is None:
        return None
    n_bits, way = literal
    word, half = ir.IntType(LANES * n_bits), LANES // 2 * n_bits
    shifts = ir.Constant(vector_of(I32, LANES), [n_bits * (lane % 8) for lane in range(LANES)])
    sides = ir.Constant(vector_of(I32, LANES), [lane // 8 for lane in range(LANES)])

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        source, values, factor, target, count = args[:5]
        entries, scales = load_table(builder, values, LANES), splat(builder, factor, LANES)
        with cgutils.for_range(builder, count, intp=I64) as loop:
            at = builder.add(source, builder.mul(loop.index, I64(LANES * n_bits // 8)))
            whole = builder.zext(load(builder, at, word, 0), I64)
            pair = ir.Constant(vector_of(I32, 2), ir.Undefined)
            for side in range(2):
                part = builder.trunc(builder.lshr(whole, I64(half * side)), I32)
                pair = builder.insert_element(pair, part, I32(side))
            index = builder.lshr(builder.shuffle_vector(pair, pair, sides), shifts)
            value = builder.fmul(look_up(builder, index, entries, LANES, way), scales)
            store(builder, value, builder.add(target, builder.mul(loop.index, I64(4 * LANES))))
        return context.get_dummy_value()

    kinds = types.intp, types.intp, types.float32, types.intp, types.intp
    return types.void(*kinds, bits, lookup), codegen


@intrinsic
def decode_bytes(typing: Any, codes: Any, first: Any, step: Any, out: Any, sixteens: Any) -> Any:
    """out[i] = first + step * code i for 16 * sixteens codes of 8 bits; arrays by address."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        source, base, slope, target, count = args
        bases, slopes = splat(builder, base, LANES), splat(builder, slope, LANES)
        with cgutils.for_range(builder, count, intp=I64) as loop:
            at = builder.add(source, builder.mul(loop.index, I64(LANES)))
            codes = builder.zext(load(builder, at, vector_of(ir.IntType(8), LANES), 0), vector_of(I32, LANES))
            value = fma(builder, builder.sitofp(codes, vector_of(F32, LANES)), slopes, bases)
            store(builder, value, builder.add(target, builder.mul(loop.index, I64(4 * LANES))))
        return context.get_dummy_value()

    return types.void(types.intp, types.float32, types.float32, types.intp, types.intp), codegen
