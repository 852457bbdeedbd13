"""Hopper's kernel for many rows, on such a GPU or an emulated one that reads memory as its matrix units do."""

from pathlib import Path

import mlx.core as mx
import pytest

from metal_kernels.errors import KernelError
from metal_kernels.gpu import hadamard, products, warpgroup
from metal_kernels.gpu.architecture import is_hopper
from metal_kernels.gpu.hadamard import Activations
from metal_kernels.gpu.warpgroup import Shape
from tests.metal_kernels.host.machine import EmulatorError, on_emulator, on_machine
from tests.metal_kernels.test_gpu_kernels import odd_case

on_hopper = on_machine if is_hopper() else on_emulator
CASES = [
    # rows, width, rows of activations, bits, group, dtype, shape
    (40, 384, 65, 3, 64, mx.float16, Shape(2, 128)),
    (100, 768, 130, 3, 32, mx.float16, Shape(1, 256)),
    (100, 1280, 70, 2, 128, mx.bfloat16, Shape(1, 64, 4)),
    (136, 256, 70, 4, 0, mx.float32, Shape(2, 256)),
    (33, 288, 17, 4, 32, mx.float32, Shape(1, 64)),
    (70, 1344, 150, 3, 64, mx.float16, Shape(1, 128, 3)),
    (130, 1024, 140, 4, 64, mx.float32, Shape(2, 64, 2)),
]


def test_products_of_warpgroups_equal_the_reference(tmp_path: Path) -> None:
    made = [odd_case(*case[:6], "cuda") for case in CASES]

    def run() -> list[mx.array]:
        ready = [hadamard.prepare(x, weight.fixed, weight.block, in_pieces=True) for x, weight, _ in made]
        return [
            warpgroup.matmul(some, weight, x.dtype, case[6])
            for case, some, (x, weight, _) in zip(CASES, ready, made, strict=True)
        ]

    for case, (x, _, right), y in zip(CASES, made, on_hopper(tmp_path, run), strict=True):
        off = mx.abs(y.astype(mx.float32) - right).max() / mx.abs(right).max()
        assert y.shape == right.shape
        assert off < (8e-3 if x.dtype == mx.bfloat16 else 1e-3), case


def test_products_take_it_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    multiply, taken = warpgroup.matmul, set[int]()
    monkeypatch.setattr(warpgroup, "there", lambda: True)
    monkeypatch.setattr(warpgroup, "matmul", lambda x, *more: taken.add(x.n) or multiply(x, *more))
    x, weight, right = odd_case(40, 256, 17, 3, 64, mx.float16, "cuda")
    several, few = on_hopper(tmp_path, lambda: [products.product(rows, weight, "cuda") for rows in (x, x[:16])])
    assert mx.abs(several.astype(mx.float32) - right).max() < 1e-3 * mx.abs(right).max()
    assert mx.abs(few.astype(mx.float32) - right[:16]).max() < 1e-3 * mx.abs(right).max()
    assert taken == {17}


@pytest.mark.skipif(not is_hopper(), reason="only a Hopper's products are in the background")
@pytest.mark.parametrize("shape", [*warpgroup.SHAPES, Shape(1, 128, 3), Shape(1, 64, 4)], ids=str)
def test_sums_are_read_when_all_products_are_done(shape: Shape) -> None:
    """With so much to multiply that a compiler that reads them too early is found out."""
    x, weight, right = odd_case(4096, 2048, 512, 3, 64, mx.float16, "cuda")
    with mx.stream(mx.gpu):
        ready = hadamard.prepare(x, weight.fixed, weight.block, in_pieces=True)
        for _ in range(5):
            y = warpgroup.matmul(ready, weight, x.dtype, shape).astype(mx.float32)
            assert mx.abs(y - right).max() < 1e-3 * mx.abs(right).max()


def test_a_team_without_blocks_is_refused() -> None:
    x, weight, _ = odd_case(40, 256, 65, 3, 64, mx.float16, "cuda")
    ready = Activations(x, 1, scaled=False, in_pieces=True)
    with pytest.raises(KernelError, match="2 teams for 1 blocks"):
        warpgroup.matmul(ready, weight, x.dtype, Shape(1, 64, 2))


RACE = "a race: "
FAULTS = {
    "a copy that nobody asked for": (("if (number < units)", "if (number + 1 < units)"), "nobody asked for"),
    "asked for before all have read": (("i % 2 == 1 && unit > 0 &&", "i % 2 == 0 && unit > 0 &&"), RACE),
    "no barrier before it is asked for": (("if (i % 2 == 0) {\nteam_barrier", "if (false) {\nteam_barrier"), RACE),
    "no wait for products": (("wait_for_products<1>();", ""), "still read"),
    "no wait at the end": (("wait_for_products<0>();", ""), "nobody waits for"),
    "a barrier for two teams": (
        (
            "if (i % 2 == 0) {\nteam_barrier<32 * SIMDGROUPS>(team)",
            "if (i % 2 == 0) {\nteam_barrier<32 * SIMDGROUPS>(0)",
        ),
        "another's",
    ),
    "a stage for two teams": (("all_staged + team * (COUNT * VECTORS)", "all_staged"), RACE),
    "sums read before they are sent": (
        ("barrier();\nif (index < THREADS)", "if (index < THREADS)"),
        "before it is written",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_in_the_background_are_found(tmp_path: Path, fault: str) -> None:
    edit, message = FAULTS[fault]
    _, weight, _ = odd_case(40, 1280, 65, 3, 64, mx.float16, "cuda")
    ready = Activations(
        mx.zeros((65, hadamard.PIECE_ROWS * 1280 // 65 + 1), mx.float16), 1, scaled=False, in_pieces=True
    )
    with pytest.raises(EmulatorError, match=message):
        on_emulator(tmp_path, lambda: [warpgroup.matmul(ready, weight, mx.float16, Shape(1, 64, 2))], edit)
