"""Where the kernels of a test run."""

from pathlib import Path

import mlx.core as mx
import pytest

from metal_kernels.launch import Constants
from tests.metal_kernels.host.machine import Machine

OF_METAL, OF_NVIDIA, OF_BOTH = {"NVIDIA": False}, {"NVIDIA": True}, {"BITS": 3}


@pytest.mark.parametrize(
    ("metal", "launched", "here"),
    [
        (True, [OF_METAL, OF_BOTH], True),
        (True, [OF_NVIDIA, OF_BOTH], False),
        (False, [OF_NVIDIA, OF_BOTH], True),
        (False, [OF_METAL], False),
        (False, [OF_METAL, OF_NVIDIA], False),
    ],
    ids=str,
)
def test_kernels_run_on_the_gpu_that_they_are_for(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    metal: bool,
    launched: list[Constants],
    here: bool,
) -> None:
    machine = Machine(tmp_path)
    for constants in launched:
        machine.variants.setdefault("a kernel", []).append((constants, (mx.uint32, mx.float16)))
    monkeypatch.setattr(mx.metal, "is_available", lambda: metal)
    assert machine.is_here == here
