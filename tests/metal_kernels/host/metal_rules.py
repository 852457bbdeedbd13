"""Reads kernels' text for Metal, its prelude too, with clang: address spaces, constants' places, types, names.

Metal is C++ with address spaces, and Apple's compiler is a clang. What it refuses and clang alone would not is looked
for in the syntax tree. Metal from 4.1 on, which macOS 27 has, takes what names no address space to lie anywhere, also a
member's own object, as C++ for OpenCL does: a program that is sound is read as that as well.
"""

import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
from clang import cindex
from clang.cindex import CursorKind

from metal_kernels.launch import FEW_VALUES, METAL_TYPES, Constants, Kernel, definitions

TYPES = METAL_TYPES | {mx.uint32: "uint"}
WARNINGS = [
    "-nostdinc", "-Wall", "-Wextra", "-Wdouble-promotion", "-Wzero-length-array", "-Wno-unused-parameter",
    "-Wno-unused-variable", "-Wno-unknown-pragmas", "-Wno-pass-failed", "-Wno-undefined-internal",
    "-Wno-undefined-inline",
]  # fmt: skip
ARGUMENTS = [
    "-x", "c++", "-std=c++14", "-target", "x86_64-linux-gnu", "-fno-exceptions", "-fno-rtti", "-fno-builtin", *WARNINGS,
]  # fmt: skip
GENERIC = ["-x", "clcpp", "-cl-std=clc++1.0", "-target", "amdgcn-amd-amdhsa", "-nogpulib", "-cl-no-stdinc", *WARNINGS]
"""Of a target that has all types."""
STORAGE = re.compile(r"threadgroup \w+ [\w#]+\[")
"""An array of threadgroup memory, which C++ would put on the stack."""

SPACES = {"device", "constant", "threadgroup", "thread", "Device", "Shared"}
SCOPES = {
    CursorKind.TRANSLATION_UNIT, CursorKind.NAMESPACE, CursorKind.STRUCT_DECL, CursorKind.CLASS_TEMPLATE,
    CursorKind.CLASS_TEMPLATE_PARTIAL_SPECIALIZATION,
}  # fmt: skip
DECLARATIONS = {CursorKind.VAR_DECL, CursorKind.PARM_DECL, CursorKind.FIELD_DECL}
POSITIONS = {
    "uint3": ("threadgroup_position_in_grid", "threadgroups_per_grid"),
    "uint": ("thread_index_in_threadgroup", "thread_index_in_simdgroup", "simdgroup_index_in_threadgroup"),
}
"""Names that a body may use, by type."""


def faults(kernel: Kernel, constants: Constants, inputs: Sequence[mx.array], outputs: Sequence[Any]) -> list[str]:
    """What is wrong, for Metal, with the program of one launch."""
    return [*diagnostics(program(kernel, constants, inputs, outputs)), *misplaced(kernel.header("metal"))]


@cache
def diagnostics(text: str) -> list[str]:
    """What clang says of a program, by line; warnings too."""
    for name in ("kernel.cpp", "kernel.clcpp"):
        unit = _parsed(text, name)[0]
        found = [str(fault) + "".join(f"\n  {note}" for note in fault.children) for fault in unit.diagnostics]
        if found:
            return found
    return []


@cache
def misplaced(text: str) -> list[str]:
    """Declarations that say no address space where Metal asks for one, or another."""
    unit, whole, head = _parsed(text)
    declared = [c for c in _below(unit.cursor) if c.kind in DECLARATIONS and c.location.offset > head]
    return [fault for cursor in declared if (fault := _fault(cursor, whole))]


def _parsed(text: str, name: str = "kernel.cpp") -> tuple[Any, str, int]:
    """The syntax tree of a program, the text that was parsed, and how much of that is not the program's."""
    head, in_cpp = Path(__file__).with_name("metal.h").read_text() + "\n", name == "kernel.cpp"
    whole = text.replace("#include <metal_simdgroup_matrix>", "")
    whole = head + (STORAGE.sub(r"static \g<0>", whole) if in_cpp else whole)
    return cindex.Index.create().parse(name, ARGUMENTS if in_cpp else GENERIC, [(name, whole)]), whole, len(head)


def program(kernel: Kernel, constants: Constants, inputs: Sequence[mx.array], outputs: Sequence[Any]) -> str:
    """One launch's program as MLX writes it around the text that it gets."""
    spaces = ["constant" if array.size < FEW_VALUES else "device" for array in inputs]
    named = zip(spaces, inputs, kernel.inputs, strict=True)
    parameters = [f"const {space} {TYPES[array.dtype]}* {name}" for space, array, name in named]
    parameters += [f"const constant int* {name}_shape" for name in kernel.inputs]
    parameters += [f"device {TYPES[kind]}* {name}" for (_, kind), name in zip(outputs, kernel.outputs, strict=True)]
    places = [f"{kind} {name} = {{}};" for kind, names in POSITIONS.items() for name in names]
    lines = [kernel.header("metal"), f"KERNEL void {kernel.name}({', '.join(parameters)}) {{", *places]
    return "\n".join([*lines, *definitions(constants, TYPES), kernel.body, "}"])


def _below(cursor: Any) -> Iterator[Any]:
    for child in cursor.get_children():
        yield child
        yield from _below(child)


def _fault(cursor: Any, whole: str) -> str | None:
    where = f"line {cursor.location.line}, {cursor.spelling}"
    # Clang's extent begins behind a `thread`, which means nothing to it.
    begin, end = (at.offset for at in (cursor.extent.start, cursor.extent.end))
    written = re.search(r"\w*\s*$", whole[:begin])[0] + whole[begin:end].split("=")[0]
    points = cursor.type.spelling.removesuffix("const").endswith(("*", "&"))
    if points and not written.lstrip().startswith("THREADGROUP_") and not SPACES & set(re.findall(r"\w+", written)):
        return f"{where}: a pointer or reference without an address space: {written}"
    static = cursor.kind == CursorKind.VAR_DECL and cursor.semantic_parent.kind in SCOPES
    if static and "address_space(2)" not in cursor.type.spelling:
        return f"{where}: a program's or a type's constant outside the constant address space"
    return None
