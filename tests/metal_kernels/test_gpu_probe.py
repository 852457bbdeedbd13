"""Kernels that do not work are found out and named before they are relied on."""

from collections.abc import Generator
from pathlib import Path

import mlx.core as mx
import pytest

from metal_kernels import dispatch
from metal_kernels.gpu import probe
from metal_kernels.launch import Kernel
from tests.metal_kernels.host.machine import GPU, on_machine

OPERATIONS = [
    *("matmul", "feed_forward", "expert_matmul", "pack_cache", "packed_attention", "quantize", "decode_attention"),
]


@pytest.fixture(autouse=True)
def nothing_remembered() -> Generator[None]:
    mx.disable_compile()
    probe.works.cache_clear()
    yield
    probe.works.cache_clear()
    mx.enable_compile()


@pytest.mark.filterwarnings("ignore:the (metal|cuda) kernel")
def test_sound_kernels_pass(tmp_path: Path) -> None:
    def run() -> list[mx.array]:
        probe.works.cache_clear()
        return [mx.array([probe.works(operation, GPU) for operation in OPERATIONS])]

    assert on_machine(tmp_path, run)[0].tolist() == [True] * len(OPERATIONS)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_does_not_compile_or_is_wrong_is_named_and_not_used(
    monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    monkeypatch.setattr(dispatch, "active_backend", lambda: "metal")

    def broken(*_: object) -> list[mx.array]:
        raise RuntimeError("Unable to build metal library from source\nprogram_source:1: error: no such thing")

    def wrong(_: Kernel, __: object, outputs: list[tuple[tuple[int, ...], mx.Dtype]], *___: object) -> list[mx.array]:
        return [mx.ones(shape, dtype) for shape, dtype in outputs]

    unbuilt = "Unable to build metal library from source: program_source:1: error: no such thing"
    for launch, reason in ((broken, unbuilt), (wrong, "its result is off by")):
        probe.works.cache_clear()
        monkeypatch.setattr(Kernel, "launch", launch)
        with pytest.warns(RuntimeWarning, match=f"kernel for {operation} does not work on this machine: {reason}"):
            assert not dispatch.has_kernel(operation)
