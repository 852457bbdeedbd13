"""LLVM vectors in numba: loads, arithmetic, and tables looked up in registers."""

from functools import cache
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils, types

I16, I32, I64, F16, F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.HalfType(), ir.FloatType()
CACHE_LINE = 64
SCALAR, AVX2, AVX512 = 0, 1, 2
"""How a table is looked up: a lane at a time on any processor, or by x86's permutes of 8 or 16 lanes."""


@cache
def available_lookups() -> tuple[int, ...]:
    """The ways this processor can look up tables, the fastest last."""
    features = llvm.get_host_cpu_features()
    return (SCALAR, *([AVX2] if features.get("avx2") else []), *([AVX512] if features.get("avx512f") else []))


def vector_of(element: ir.Type, lanes: int) -> ir.VectorType:
    return ir.VectorType(element, lanes)


def splat(builder: ir.IRBuilder, scalar: ir.Value, lanes: int) -> ir.Value:
    vector = vector_of(scalar.type, lanes)
    single = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, I32(0))
    return builder.shuffle_vector(
        single, ir.Constant(vector, ir.Undefined), ir.Constant(vector_of(I32, lanes), [0] * lanes)
    )


def filled(kind: ir.VectorType, value: float) -> ir.Value:
    """A constant with the same value in every lane."""
    return ir.Constant(kind, [value] * kind.count)


def constant(value: int, lanes: int) -> ir.Value:
    return filled(vector_of(I32, lanes), value)


def call(builder: ir.IRBuilder, name: str, result: ir.Type, *arguments: ir.Value) -> ir.Value:
    """Call one of LLVM's own functions."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    return call(builder, f"llvm.fma.v{a.type.count}f32", a.type, a, b, c)


def load(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type, offset: int) -> ir.Value:
    """Load one `kind` at byte `offset` of an integer address, assuming the alignment of its element only."""
    place = builder.add(address, I64(offset)) if offset else address
    element = kind.element if isinstance(kind, ir.VectorType) else kind
    return builder.load(builder.inttoptr(place, kind.as_pointer()), align=4 if element in (I32, F32) else 2)


def store(builder: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
    """Store a float32 or a vector of them at an integer address."""
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=4)


def prefetch(builder: ir.IRBuilder, address: ir.Value, size: int) -> None:
    """Ask the second cache for the lines of `size` bytes from an integer address on; it may lie beyond any array."""
    read, second_cache, data = I32(0), I32(2), I32(1)
    for offset in range(0, size, CACHE_LINE):
        pointer = builder.inttoptr(builder.add(address, I64(offset)), I16.as_pointer())
        call(builder, "llvm.prefetch.p0i16", ir.VoidType(), pointer, read, second_cache, data)


def sum_lanes(builder: ir.IRBuilder, vector: ir.Value, lanes: int) -> ir.Value:
    while lanes > 1:
        lanes //= 2
        mask_low = ir.Constant(vector_of(I32, lanes), list(range(lanes)))
        mask_high = ir.Constant(vector_of(I32, lanes), list(range(lanes, 2 * lanes)))
        vector = builder.fadd(
            builder.shuffle_vector(vector, vector, mask_low), builder.shuffle_vector(vector, vector, mask_high)
        )
    return builder.extract_element(vector, I32(0))


def look_up(builder: ir.IRBuilder, index: ir.Value, table: list[ir.Value], lanes: int, lookup: int) -> ir.Value:
    """table[index mod 16] for each lane; `table` is what `load_table` returns."""
    if lanes == 16 and lookup == AVX512:
        return call(builder, "llvm.x86.avx512.permvar.sf.512", vector_of(F32, 16), table[0], index)
    if lookup != SCALAR:
        return _look_up_halves(builder, index, table, lanes)
    masked = builder.and_(index, constant(15, lanes))
    result = ir.Constant(vector_of(F32, lanes), ir.Undefined)
    for lane in range(lanes):
        entry = builder.extract_element(table[0], builder.extract_element(masked, I32(lane)))
        result = builder.insert_element(result, entry, I32(lane))
    return result


def _look_up_halves(builder: ir.IRBuilder, index: ir.Value, table: list[ir.Value], lanes: int) -> ir.Value:
    """AVX2: eight-entry permutes of the table's low and high half, chosen by bit 3 of the index."""
    v, vi = vector_of(F32, 8), vector_of(I32, 8)
    parts: list[ir.Value] = []
    for start in range(0, lanes, 8):
        chosen = (
            index
            if lanes == 8
            else builder.shuffle_vector(index, index, ir.Constant(vi, list(range(start, start + 8))))
        )
        low, high = (call(builder, "llvm.x86.avx2.permps", v, half, chosen) for half in table[1:])
        bit = builder.icmp_signed("<", builder.shl(chosen, constant(28, 8)), constant(0, 8))
        parts.append(builder.select(bit, high, low))
    if lanes == 8:
        return parts[0]
    return builder.shuffle_vector(parts[0], parts[1], ir.Constant(vector_of(I32, 16), list(range(16))))


def load_table(builder: ir.IRBuilder, address: ir.Value, lanes: int) -> list[ir.Value]:
    """The sixteen table values as one vector of 16 and as two of 8."""
    whole = load(builder, address, vector_of(F32, 16), 0)
    halves = [load(builder, address, vector_of(F32, 8), 32 * i) for i in range(2)]
    return [whole, *halves]


def literals(*arguments: Any) -> tuple[int, ...] | None:
    """The values of arguments that are literals; None where one is not."""
    if not all(isinstance(a, types.IntegerLiteral) for a in arguments):
        return None
    return tuple(a.literal_value for a in arguments)
