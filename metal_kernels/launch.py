"""From the text of a kernel to a compiled one, on Metal and on CUDA alike.

A kernel is a body, a few lines that call into the other files of `source/`, which are written once over a small
dialect; `prelude_metal.h` and `prelude_cuda.h` give the dialect each machine's own words.
"""

import atexit
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from metal_kernels.compilation import compiles_on_cuda
from metal_kernels.errors import KernelError

Dialect = Literal["metal", "cuda", "host"]
Constants = Mapping[str, int | bool | mx.Dtype]
"""A launch's compile-time values."""
SOURCE = Path(__file__).resolve().parent / "source"
NVIDIA_PARTS = re.compile(r"#ifdef NVIDIA_INSTRUCTIONS\n.*?#endif\n", re.S)
"""What Metal would skip."""
FEW_VALUES = 8
"""MLX hands an input of fewer to one of Metal's kernels in the constant address space."""
SIMD = 32
"""Threads of a simdgroup on every GPU that runs these kernels."""
_CUDA_TYPES = {mx.float32: "float", mx.float16: "__half", mx.bfloat16: "__nv_bfloat16"}
METAL_TYPES = {mx.float32: "float", mx.float16: "half", mx.bfloat16: "bfloat16_t"}


@dataclass(frozen=True)
class Kernel:
    """A kernel's name, the files of `source/` that it needs, and its arrays; its body is the .kernel file of its name.

    In the name of a file {dialect} stands for that.
    large_memory: bytes for THREADGROUP_LARGE; least_threads: for how many threads, of one threadgroup or several, a
    multiprocessor's registers have to do. Both are CUDA's alone.
    """

    name: str
    sources: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    large_memory: int = 0
    least_threads: int = 0

    def header(self, dialect: Dialect) -> str:
        """The dialect's prelude and the kernel's files."""
        text = _flat([f"prelude_{dialect}.h", *(name.format(dialect=dialect) for name in self.sources)])
        return NVIDIA_PARTS.sub("", text) if dialect == "metal" else text

    @property
    def body(self) -> str:
        """What the kernel does; MLX looks for the names of shapes in it."""
        return _flat([self.name.removeprefix("turboquant_") + ".kernel"])

    def launch(
        self,
        inputs: Sequence[mx.array],
        outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
        groups: tuple[int, int],
        threads: int,
        constants: Constants,
    ) -> list[mx.array]:
        """Run `groups` threadgroups of `threads`; `outputs` are shapes and dtypes.

        Raises KernelError where MLX has no GPU here.
        """
        on_cuda = _dialect() == "cuda"
        made = (_on_cuda if on_cuda else _on_metal)(self, threads, tuple(constants.items()))
        return made(
            inputs=list(inputs) if on_cuda else [long_enough(array) for array in inputs],
            output_shapes=[shape for shape, _ in outputs],
            output_dtypes=[dtype for _, dtype in outputs],
            grid=(groups[0] * threads, groups[1], 1),
            threadgroup=(threads, 1, 1),
        )


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


def long_enough(array: mx.array) -> mx.array:
    """An array of which Metal puts the values where others' are, not among constants, as it does with fewer than 8.

    A shorter one has zeros after it, and is flat.
    """
    return array if array.size >= FEW_VALUES else mx.pad(array.reshape(-1), (0, FEW_VALUES - array.size))


@cache
def constant(value: float) -> mx.array:
    """A number as an array that every launch shares."""
    return made(mx.full((FEW_VALUES,), value))


def float_bits(value: float) -> int:
    """A float32 as an integer, for a compile-time value: kernels have it back by `bits_float`."""
    return int(np.float32(value).view(np.int32))


@cache
def table(numbers: tuple[float, ...]) -> mx.array:
    """Numbers as an array that every launch shares, repeated until they are long enough, see `long_enough`."""
    return mx.array(np.resize(np.array(numbers, np.float32), max(FEW_VALUES, len(numbers))))


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
def _on_metal(
    kernel: Kernel, threads: int, constants: tuple[tuple[str, int | bool | mx.Dtype], ...]
) -> Callable[..., list[mx.array]]:
    """A kernel that may use as many registers as allow `threads` in a threadgroup.

    Its constants are part of its text: MLX's templates put their values into names, and before 0.32.4 a minus too.
    """
    bound = f"[[max_total_threads_per_threadgroup({threads})]]\n"
    source = "\n".join([*definitions(dict(constants), METAL_TYPES), kernel.body])
    return _made_of(kernel, mx.fast.metal_kernel, kernel.header("metal") + bound, source)


@cache
def _on_cuda(
    kernel: Kernel, threads: int, constants: tuple[tuple[str, int | bool | mx.Dtype], ...]
) -> Callable[..., list[mx.array]]:
    """A kernel whose text is in two files, all but the names of shapes: MLX hashes its text at every launch.

    A threadgroup's `threads` bound the registers of each, or some kernels could not be launched; `least_threads` may
    bound them further.
    """
    compiles_on_cuda()
    body = kernel.body
    names = "".join(f"// {name}\n" for name in sorted(set(re.findall(r"\w+_shape\b", body))))
    header = _written(f"#define MOST_THREADS {max(threads, kernel.least_threads)}\n{kernel.header('cuda')}")
    source = names + _written("\n".join([*definitions(dict(constants), _CUDA_TYPES), body]))
    return _made_of(kernel, mx.fast.cuda_kernel, header, source)


def _made_of(kernel: Kernel, make: Any, header: str, source: str) -> Callable[..., list[mx.array]]:
    more = {"shared_memory": kernel.large_memory} if kernel.large_memory and make is mx.fast.cuda_kernel else {}
    return make(
        name=kernel.name,
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        source=source,
        header=header,
        **more,
    )


def definitions(constants: Constants, types: Mapping[mx.Dtype, str]) -> list[str]:
    """Compile-time values in C++; types: the names of dtypes."""
    lines: list[str] = []
    for name, value in constants.items():
        if isinstance(value, mx.Dtype):
            lines.append(f"using {name} = {types[value]};")
        else:
            kind = "bool" if isinstance(value, bool) else "int"
            lines.append(f"constexpr {kind} {name} = {str(value).lower()};")
    return lines


def _written(text: str) -> str:
    """A line that names a file of this text, which is there until this process ends."""
    try:
        place = _folder() / sha256(text.encode()).hexdigest()[:12]
        if not place.exists():
            place.parent.mkdir(exist_ok=True)  # systems clear such folders after days
            place.write_text(text)
    except OSError as error:
        raise KernelError(f"a GPU kernel's text could not be written to {tempfile.gettempdir()}: {error}") from error
    return f'#include "{place}"\n'


@cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="tq-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
