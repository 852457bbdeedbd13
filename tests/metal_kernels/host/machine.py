"""Runs kernels on this machine's GPU or, compiled with g++, on emulator.h's; reads them as Metal too."""

import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels.gpu.products import Gpu
from metal_kernels.launch import Constants, Kernel, definitions, long_enough
from tests.metal_kernels.host import metal_rules

HERE = Path(__file__).resolve().parent
GPU: Gpu = "cuda" if mx.cuda.is_available() else "metal"
"""The kind of this machine's GPU; without one, that of the emulated."""
Run = Callable[[], list[mx.array]]


@dataclass(frozen=True)
class Launch:
    """One call of a kernel, as `Kernel.launch` gets it."""

    inputs: Sequence[mx.array]
    outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]]
    groups: tuple[int, int]
    threads: int
    constants: Constants


@dataclass
class Machine:
    """Stands in for `Kernel.launch`: runs the program at once, or only notes what it would have to compile."""

    folder: Path
    edits: tuple[tuple[str, str], ...] = ()
    variants: dict[str, list[tuple[Constants, tuple[mx.Dtype, ...]]]] = field(default_factory=dict)
    programs: dict[str, Path] = field(default_factory=dict)
    noting: bool = False

    def launch(self, kernel: Kernel, call: Launch) -> list[mx.array]:
        for_metal = not call.constants.get("NVIDIA", False)
        if for_metal:
            call = replace(call, inputs=[long_enough(array) for array in call.inputs])
        variant = (dict(call.constants), tuple([a.dtype for a in call.inputs] + [d for _, d in call.outputs]))
        known = self.variants.setdefault(kernel.name, [])
        if self.noting:
            if variant not in known:
                known.append(variant)
            if for_metal and not mx.metal.is_available():
                faults = metal_rules.faults(kernel, call.constants, call.inputs, call.outputs)
                assert not faults, "\n".join([kernel.name, *faults])
            return [mx.zeros(shape, dtype) for shape, dtype in call.outputs]
        if kernel.name not in self.programs:
            self.programs[kernel.name] = self._build(kernel, known)
        return self._run(self.programs[kernel.name], known.index(variant), call)

    @property
    def is_here(self) -> bool:
        """Whether this machine's own GPU, where it has one, is of the kind that all that was noted is for."""
        kinds = {constants.get("NVIDIA") for variants in self.variants.values() for constants, _ in variants}
        return kinds <= {None, not mx.metal.is_available()}

    def _build(self, kernel: Kernel, variants: list[tuple[Constants, tuple[mx.Dtype, ...]]]) -> Path:
        program = self.folder / kernel.name
        text = kernel.header("host") + "".join(_variant(kernel, i, *v) for i, v in enumerate(variants))
        for old, new in self.edits:
            if text.count(old) != 1:
                raise LookupError(f"{text.count(old)} times in the source: {old}")
            text = text.replace(old, new)
        names = ", ".join(f"variant_{i}" for i in range(len(variants)))
        text += f"int main() {{ return emulator::main({{{names}}}); }}\n"
        program.with_suffix(".cpp").write_text(text)
        flags = [
            "-std=c++17",
            "-O0",
            "-fsanitize=address,undefined",
            "-fno-sanitize-recover=all",
            "-Wall",
            "-Wextra",
            "-Wvla",
            "-Wdouble-promotion",
            "-Wno-clobbered",
            "-Wno-unused-parameter",
            "-Wno-unknown-pragmas",
            "-Wno-unused-variable",
            "-Werror",
            f"-I{HERE}",
        ]
        command = ["g++", *flags, str(program.with_suffix(".cpp")), "-o", str(program)]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        assert finished.returncode == 0, finished.stderr[:4000]
        return program

    def _run(self, program: Path, variant: int, call: Launch) -> list[mx.array]:
        poison = [np.full(int(np.prod(shape)) * dtype.size, 0xFF, np.uint8) for shape, dtype in call.outputs]
        request = [
            struct.pack(
                "6i", variant, *call.groups, call.threads, len(call.inputs), len(call.inputs) + len(call.outputs)
            )
        ]
        for array in call.inputs:
            request.append(
                _head(array.shape, array.dtype.size) + bytes(memoryview(mx.contiguous(array).view(mx.uint8)))
            )
        for (shape, dtype), filling in zip(call.outputs, poison, strict=True):
            request.append(_head(shape, dtype.size) + filling.tobytes())
        finished = subprocess.run(
            [str(program)],
            input=b"".join(request),
            capture_output=True,
            check=False,
            env={"ASAN_OPTIONS": "detect_stack_use_after_return=0"},
        )
        if finished.returncode:
            raise EmulatorError(finished.stderr.decode())
        answers, at = [], 0
        for shape, dtype in call.outputs:
            size = int(np.prod(shape)) * dtype.size
            raw = mx.array(np.frombuffer(finished.stdout[at : at + size], np.uint8))
            answers.append(raw.view(dtype).reshape(shape))
            at += size
        return answers


class EmulatorError(AssertionError):
    """The emulated GPU stopped; the text says at what."""


def on_machine(folder: Path, run: Run) -> list[mx.array]:
    """What `run` returns with its kernels on this machine's GPU, where it has one of their kind, or on the emulated."""
    machine = noted(folder, run)
    if not (mx.is_available(mx.Device(mx.gpu)) and machine.is_here):
        return _on(machine, run)
    with mx.stream(mx.gpu):
        found = run()
        mx.eval(found)
        return found


def on_emulator(folder: Path, run: Run, *edits: tuple[str, str]) -> list[mx.array]:
    """What `run` returns with its kernels on the emulated GPU, with `edits` of their source."""
    return _on(noted(folder, run, *edits), run)


def _on(machine: Machine, run: Run) -> list[mx.array]:
    needs_compiler()
    with launched_by(machine.launch):
        return run()


def noted(folder: Path, run: Run, *edits: tuple[str, str]) -> Machine:
    """A machine that knows what `run` launches."""
    machine = Machine(folder, edits, noting=True)
    with launched_by(machine.launch):
        run()
    machine.noting = False
    return machine


@contextmanager
def launched_by(launch: Callable[[Kernel, Launch], list[mx.array]]) -> Generator[None]:
    """Within, every kernel is launched by `launch`, and what MLX would compile is called as it is."""

    def with_one_call(kernel: Kernel, *call: Any) -> list[mx.array]:
        return launch(kernel, Launch(*call))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kernel, "launch", with_one_call)
        mx.disable_compile()
        try:
            yield
        finally:
            mx.enable_compile()


def needs_compiler() -> None:
    if sys.platform != "linux" or shutil.which("g++") is None:
        pytest.skip("the emulated GPU needs g++ on Linux")


def _head(shape: Sequence[int], size: int) -> bytes:
    return struct.pack(f"{len(shape) + 2}i", len(shape), *shape, size)


def _variant(kernel: Kernel, index: int, constants: Constants, dtypes: Sequence[mx.Dtype]) -> str:
    lines = [f"static void variant_{index}(emulator::Arguments& arguments) {{"]
    lines += definitions(constants, metal_rules.TYPES)
    for i, name in enumerate((*kernel.inputs, *kernel.outputs)):
        constant = "const " if i < len(kernel.inputs) else ""
        lines.append(f"  auto {name} = arguments.at<{constant}{metal_rules.TYPES[dtypes[i]]}>({i});")
        lines.append(f"  [[maybe_unused]] auto {name}_shape = arguments.shape({i});")
    lines.append("  emulator::launch(arguments.groups, arguments.threads, [=] {" + kernel.body + "  });\n}\n")
    return "\n".join(lines)


__all__ = ["GPU", "EmulatorError", "Launch", "Machine", "launched_by", "needs_compiler", "on_emulator", "on_machine"]
