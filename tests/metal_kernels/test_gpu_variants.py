"""How many kernels are compiled for prompts of every length: each takes NVIDIA's compiler a second or two."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from metal_kernels.gpu import attention as gpu_attention
from metal_kernels.gpu import products
from metal_kernels.gpu.attention import HeadCode, Kind
from metal_kernels.gpu.turned_product import Norm
from metal_kernels.launch import Kernel
from quant_engine.codebook import lloyd_max
from tests.metal_kernels.test_gpu_kernels import on_machine
from tests.metal_kernels.test_gpu_turned_product import weight_of

WIDTH, INNER = 256, 320
LENGTHS = range(1, 41)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> set[tuple[Any, ...]]:
    """The kernels that launches need, of which each has its own text; results are zeros."""
    found: set[tuple[Any, ...]] = set()

    def launch(kernel: Kernel, _: Any, outputs: Sequence[Any], *call: Any) -> list[mx.array]:
        _groups, threads, constants = call
        found.add((kernel.name, threads, *map(str, constants.items())))
        return [mx.zeros(shape, dtype) for shape, dtype in outputs]

    monkeypatch.setattr(Kernel, "launch", launch)
    return found


def test_products_of_prompts_share_kernels(compiled: set[tuple[Any, ...]]) -> None:
    weight = weight_of(3, 64, WIDTH)[0]
    for n in LENGTHS:
        x = mx.zeros((1, n, WIDTH), mx.float16)
        y = products.multiply(x, weight, "cuda", added=mx.zeros((1, n, weight.rows), mx.float16))
        assert y.shape == (1, n, weight.rows)
    names = [name for name, *_ in compiled]
    few = {name: names.count(name) for name in names if "rotate" not in name and "matmul" not in name}
    assert few == {"turboquant_turned_product_one": 5, "turboquant_matvec": 1}, "1, 2, 3, 4 and 8 rows, and 16"
    assert len(names) <= 10


@pytest.mark.parametrize("shape", [(6, 1, WIDTH), (6, WIDTH)])
def test_a_batch_of_one_position_each_is_not_padded(compiled: set[tuple[Any, ...]], shape: tuple[int, ...]) -> None:
    products.multiply(mx.zeros(shape, mx.float16), weight_of(3, 64, WIDTH)[0], "cuda")
    assert any("('COUNT', 6)" in settings for settings in compiled)


def test_joining_parts_of_attention_takes_one_kernel_for_all_prompts(compiled: set[tuple[Any, ...]]) -> None:
    head = HeadCode.of(lloyd_max(3), 64, None, 1, 64)
    tokens = mx.zeros((1, 2, 512, 6), mx.uint32), mx.zeros((1, 2, 512, 1), mx.float16)
    kind = Kind(head, head, 0.1, causal=True, gpu="cuda")
    for n in LENGTHS:
        q = mx.zeros((1, 4, n, 64), mx.float16)
        gpu_attention.attend(q, tokens, tokens, kind, length=500, bias=None, sinks=None)
    assert [name for name, *_ in compiled].count("turboquant_attention_parts") == 1
    assert len(compiled) <= 4


@pytest.mark.parametrize("n", [6, 11])
def test_padded_positions_leave_no_trace(tmp_path: Path, n: int) -> None:
    (gate_up, first), (down, second) = weight_of(3, 64, WIDTH, rows=2 * INNER), weight_of(4, 64, INNER, rows=WIDTH)
    norm = Norm(mx.ones((WIDTH,), mx.float16), 1e-5)
    x, added, bias = (
        mx.random.normal((1, count, WIDTH), key=mx.random.key(count)).astype(mx.float16) for count in (n, n, 1)
    )

    def run() -> list[mx.array]:
        return [
            products.gated(x, gate_up, down, "cuda", norm, added),
            products.gated(x, gate_up, down, "cuda", added=bias),
            products.multiply(x, gate_up, "cuda", norm),
        ]

    normed = norm(x).astype(mx.float32)
    rights = [
        _gated(normed, first, second) + added,
        _gated(x.astype(mx.float32), first, second) + bias,
        normed @ first.T,
    ]
    for found, right in zip(on_machine(tmp_path, run), rights, strict=True):
        assert found.shape == right.shape
        assert mx.abs(found.astype(mx.float32) - right).max() < 5e-3 * mx.abs(right).max()


def _gated(x: mx.array, first: mx.array, second: mx.array) -> mx.array:
    gate, up = (x @ first.T).split(2, axis=-1)
    return (gate * mx.sigmoid(gate) * up) @ second.T
