"""From the text of a kernel to a compiled one, on Metal and on CUDA alike.

A kernel is a body, a few lines that call into the other files of `source/`, which are written once over a small
dialect; `prelude_metal.h` and `prelude_cuda.h` give the dialect each machine's own words.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

import mlx.core as mx
import numpy as np

from metal_kernels.errors import KernelError

Dialect = Literal["metal", "cuda", "host"]
SOURCE = Path(__file__).resolve().parent / "source"
NVIDIA_PARTS = re.compile(r"#ifdef NVIDIA_INSTRUCTIONS\n.*?#endif\n", re.S)
"""What Metal would skip."""
SIMD = 32
"""Threads of a simdgroup on every GPU that runs these kernels."""


@dataclass(frozen=True)
class Kernel:
    """A kernel's name, the files of `source/` that it needs, and its arrays; its body is the .kernel file of its name.

    large_memory: bytes for THREADGROUP_LARGE, which CUDA alone has.
    """

    name: str
    sources: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    large_memory: int = 0

    def header(self, dialect: Dialect, threads: int = 1024) -> str:
        """The dialect's prelude and the kernel's files; CUDA's compiler reads them itself, Metal's cannot.

        MLX hashes the text at every launch. On CUDA a threadgroup's `threads` bound the registers of each, or some
        kernels could not be launched.
        """
        names = (f"prelude_{dialect}.h", *self.sources)
        if dialect == "cuda":
            return f"#define MOST_THREADS {threads}\n" + "".join(map(_include, names))
        return NVIDIA_PARTS.sub("", _flat(names)) if dialect == "metal" else _flat(names)

    def body(self, dialect: Dialect) -> str:
        """What the kernel does, as MLX takes it, which looks for the names of shapes in it."""
        name = self.name.removeprefix("turboquant_") + ".kernel"
        text = _flat([name])
        if dialect == "cuda":
            shapes = sorted(set(re.findall(r"\w+_shape\b", text)))
            return f"// {' '.join(shapes)}\n{_include(name)}"
        return text

    def launch(
        self,
        inputs: Sequence[mx.array],
        outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
        groups: tuple[int, int],
        threads: int,
        constants: Mapping[str, int | bool | mx.Dtype],
    ) -> list[mx.array]:
        """Run `groups` threadgroups of `threads`; `outputs` are shapes and dtypes, `constants` compile-time values.

        Raises KernelError where MLX has no GPU here.
        """
        dialect = _dialect()
        compiled = _compiled(self, dialect, threads if dialect == "cuda" else 0)
        return compiled(
            inputs=list(inputs),
            output_shapes=[shape for shape, _ in outputs],
            output_dtypes=[dtype for _, dtype in outputs],
            grid=(groups[0] * threads, groups[1], 1),
            threadgroup=(threads, 1, 1),
            template=list(constants.items()),
        )


def _include(name: str) -> str:
    return f'#include "{SOURCE / name}"\n'


def _flat(names: Iterable[str]) -> str:
    """The text of files of `source/` with what they include, each once, without comments and indentation."""
    seen = set[str]()

    def lines(name: str) -> Iterator[str]:
        if name in seen:
            return
        seen.add(name)
        for line in (SOURCE / name).read_text().splitlines():
            if included := re.fullmatch(r'#include "(.+\.(?:metal|kernel))"', line):
                yield from lines(included[1])
            elif text := line.split("//")[0].strip().replace("#pragma once", ""):
                yield text

    return "\n".join(line for name in names for line in lines(name)) + "\n"


@cache
def constant(value: float) -> mx.array:
    """A number as an array that every launch shares, long enough for Metal to put it where the others are."""
    return made(mx.full((8,), value))


def float_bits(value: float) -> int:
    """A float32 as an integer, for a compile-time value: kernels have it back by `bits_float`."""
    return int(np.float32(value).view(np.int32))


@cache
def table(numbers: tuple[float, ...]) -> mx.array:
    """Numbers as an array that every launch shares, repeated until they are long enough, see `constant`."""
    return mx.array(np.resize(np.array(numbers, np.float32), max(8, len(numbers))))


@cache
def zeros(dtype: mx.Dtype) -> mx.array:
    """What stands for an array that a launch does without."""
    return made(mx.zeros((1, 8), dtype))


def made(array: mx.array) -> mx.array:
    """An array that is computed now: otherwise a compiled function that finds it computes it again on every call."""
    mx.eval(array)
    return array


def number(value: int) -> mx.array:
    """A whole number as the first value of an array: a view, since a new array would have to reach the GPU first."""
    if not _numbers or value + 8 > _numbers[0].size:
        _numbers[:] = [made(mx.arange(1 << max(20, (value + 8).bit_length()), dtype=mx.uint32))]
    return _numbers[0][value : value + 8]


_numbers: list[mx.array] = []
"""All of them from 0 on, as far as any was asked for: one array."""


def _dialect() -> Dialect:
    if mx.default_device() == mx.Device(mx.cpu):
        raise KernelError(
            "a GPU kernel was asked for and MLX computes on the CPU here; use the cpu or reference backend"
        )
    return "metal" if mx.metal.is_available() else "cuda"


@cache
def _compiled(kernel: Kernel, dialect: Dialect, threads: int) -> Callable[..., list[mx.array]]:
    make = cast(Any, mx.fast.metal_kernel if dialect == "metal" else mx.fast.cuda_kernel)
    more = {"shared_memory": kernel.large_memory} if kernel.large_memory else {}
    return make(
        name=kernel.name,
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        source=kernel.body(dialect),
        header=kernel.header(dialect, threads),
        **more,
    )
