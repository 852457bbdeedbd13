"""What MLX gets of a kernel."""

import re
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from metal_kernels import announce_compilation, launch
from metal_kernels.errors import KernelError
from metal_kernels.launch import Kernel

KERNEL = Kernel("turboquant_unpack_tokens", ("unpack_tokens.metal",), ("packed",), ("out",))
INCLUDED = re.compile(r'#include "(.+)"\n')


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Generator[list[dict[str, Any]]]:
    """The kernels that MLX's CUDA build would be asked for, with what each is launched with."""
    kernels: list[dict[str, Any]] = []

    def cuda_kernel(**texts: Any) -> Any:
        launches: list[dict[str, Any]] = []
        kernels.append(texts | {"launches": launches})
        return lambda **given: launches.append(given)

    monkeypatch.setattr(launch, "_dialect", lambda: "cuda")
    monkeypatch.setattr(mx.fast, "cuda_kernel", cuda_kernel)
    launch._on_cuda.cache_clear()
    yield kernels
    launch._on_cuda.cache_clear()


def start(threads: int = 64, **constants: int | bool | mx.Dtype) -> None:
    KERNEL.launch([mx.zeros((8,))], [((8,), mx.float16)], (3, 2), threads, constants)


def test_cuda_kernels_are_given_as_files(made: list[dict[str, Any]]) -> None:
    start(BITS=3, LATE=True, T=mx.bfloat16)
    (kernel,) = made
    header, body = (INCLUDED.search(kernel[text]) for text in ("header", "source"))
    assert header and body and header[0] == kernel["header"]
    assert kernel["source"].removesuffix(body[0]).splitlines() == [
        f"// {name}" for name in sorted(set(re.findall(r"\w+_shape", KERNEL.body)))
    ]
    before, inside = (Path(found[1]).read_text() for found in (header, body))
    assert before == "#define MOST_THREADS 64\n" + KERNEL.header("cuda")
    assert inside.endswith(KERNEL.body)
    for line in ("constexpr int BITS = 3;", "constexpr bool LATE = true;", "using T = __nv_bfloat16;"):
        assert line in inside
    assert (kernel["launches"][0]["grid"], kernel["launches"][0]["threadgroup"]) == ((192, 2, 1), (64, 1, 1))


def test_each_variant_is_a_kernel_of_its_own(made: list[dict[str, Any]]) -> None:
    """MLX tells them apart by their text."""
    for bits, threads in ((2, 64), (3, 64), (2, 64), (2, 128)):
        start(threads, BITS=bits)
    assert len(made) == 3 and len({kernel["header"] + kernel["source"] for kernel in made}) == 3
    assert [len(kernel["launches"]) for kernel in made] == [2, 1, 1]


def test_the_first_that_is_compiled_is_announced(made: list[dict[str, Any]]) -> None:
    start(BITS=2)
    told: list[str] = []
    with announce_compilation(told.append):
        start(BITS=2)
        assert told == []
        start(BITS=3)
        start(BITS=4)
    assert len(told) == 1 and "compiling GPU kernels" in told[0] and len(made) == 3


def test_files_that_a_system_cleared_away_are_written_again(made: list[dict[str, Any]]) -> None:
    start(BITS=2)
    shutil.rmtree(launch._folder())
    start(BITS=3)
    for text in ("header", "source"):
        found = INCLUDED.search(made[1][text])
        assert found and Path(found[1]).read_text()


def test_a_text_that_cannot_be_written_is_told(made: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_folder", lambda: Path("/dev/null/nowhere"))
    with pytest.raises(KernelError, match=r"a GPU kernel's text could not be written to .+: .*Not a directory"):
        start(BITS=4, T=mx.float32)
    assert not made


def test_metal_kernels_carry_constants_and_a_bound_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """No value may reach a name that MLX makes: before 0.32.4 it put a minus there."""
    kernels: list[dict[str, Any]] = []
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(launch, "_dialect", lambda: "metal")
    monkeypatch.setattr(mx.fast, "metal_kernel", lambda **texts: kernels.append(texts) or (lambda **g: given.append(g)))
    launch._on_metal.cache_clear()
    start(BITS=-3, T=mx.bfloat16)
    KERNEL.launch([mx.ones((2, 2))], [((8,), mx.float16)], (3, 2), 64, {"BITS": -3, "T": mx.bfloat16})
    launch._on_metal.cache_clear()
    (kernel,) = kernels
    assert kernel["header"] == KERNEL.header("metal") + "[[max_total_threads_per_threadgroup(64)]]\n"
    assert kernel["source"] == "constexpr int BITS = -3;\nusing T = bfloat16_t;\n" + KERNEL.body
    assert all("template" not in one for one in given)
    assert given[1]["inputs"][0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0], "long enough to lie where others do"
