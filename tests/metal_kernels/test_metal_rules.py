"""What Apple's compiler would refuse in a kernel's text is found; what the kernels' tests run is read everywhere."""

import mlx.core as mx
import pytest

from metal_kernels.gpu.matvec import MATVEC
from metal_kernels.launch import Kernel
from tests.metal_kernels.host import metal_rules

CONSTANTS = {
    "BITS": 3, "GROUP": 32, "SIMDGROUPS": 2, "PARTS": 1, "SCALED": True, "COLUMNS": 4, "NVIDIA": False, "SPARE": 0,
    "ADDED": 1, "ALL_TILES": 3, "BLOCKS": 2, "COUNT": 4, "PIECES": 2,
    "LOW0": 0, "LOW1": 0, "HIGH0": 0, "HIGH1": 0, "T": mx.bfloat16,
}  # fmt: skip
DTYPES = (mx.float16, mx.uint32, mx.bfloat16)
FAULTS = {
    "an address space left out": (
        "const thread LaneTable& values_of", "const LaneTable& values_of", "without an address space",
    ),
    "a pointer to another space": (
        "inline uint load_pair(Device<const half> at)", "inline uint load_pair(Shared<const half> at)",
        "no matching function for call to 'load_pair'",
    ),
    "a constant elsewhere": (
        "CONSTANT int VALUES", "static constexpr int VALUES", "outside the constant address space",
    ),
    "a double": ("at[i] = 0;", "at[i] = 0.5 * at[i];", "increases floating-point precision"),
    "a name that Metal has not": ("exp2(", "exp2f(", "exp2f"),
    "a member of what may lie anywhere": (
        "void add_up(const thread RowsOfLane<COLUMNS, NVIDIA, X>& x, Shared<float> partial) thread {",
        "void add_up(const thread RowsOfLane<COLUMNS, NVIDIA, X>& x, Shared<float> partial) {", "__generic",
    ),
}  # fmt: skip


def text_of(kernel: Kernel, sizes: tuple[int, ...] = (64,) * len(DTYPES)) -> str:
    inputs = [mx.zeros((size,), dtype) for size, dtype in zip(sizes, DTYPES, strict=True)]
    return metal_rules.program(kernel, CONSTANTS, inputs, [((4, 40), mx.bfloat16)])


def faults(text: str) -> str:
    return "\n".join([*metal_rules.diagnostics(text), *metal_rules.misplaced(text)])


def test_sound_text_has_no_fault() -> None:
    assert faults(text_of(MATVEC)) == ""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault: str) -> None:
    right, wrong, message = FAULTS[fault]
    text = text_of(MATVEC)
    assert right in text
    assert message in faults(text.replace(right, wrong))


def test_a_short_input_that_the_kernel_takes_for_a_devices_is_found() -> None:
    assert "cannot pass pointer to address space" in faults(text_of(MATVEC, (64, 4, 64)))
