"""How many kernels are compiled for prompts of every length: each takes NVIDIA's compiler a second or two."""

from pathlib import Path

import mlx.core as mx
import pytest

from metal_kernels.gpu import attention as gpu_attention
from metal_kernels.gpu import products
from metal_kernels.gpu.attention import HeadCode, Kind
from metal_kernels.gpu.turned_product import Norm
from metal_kernels.launch import Kernel
from quant_engine.codebook import lloyd_max
from tests.metal_kernels.host.machine import Launch, Machine, on_machine
from tests.metal_kernels.test_gpu_turned_product import weight_of

WIDTH, INNER = 256, 320
LENGTHS = range(1, 41)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Notes what launches would have to compile; results are zeros."""
    noting = Machine(tmp_path, noting=True)
    monkeypatch.setattr(Kernel, "launch", lambda kernel, *call: noting.launch(kernel, Launch(*call)))
    return noting


def test_products_of_prompts_share_kernels(machine: Machine) -> None:
    weight = weight_of(3, 64, WIDTH)[0]
    for n in LENGTHS:
        x = mx.zeros((1, n, WIDTH), mx.float16)
        y = products.multiply(x, weight, "cuda", added=mx.zeros((1, n, weight.rows), mx.float16))
        assert y.shape == (1, n, weight.rows)
    counts = {name: len(variants) for name, variants in machine.variants.items()}
    few = {name: count for name, count in counts.items() if "rotate" not in name and "matmul" not in name}
    assert few == {"turboquant_turned_product_one": 5, "turboquant_matvec": 1}, "1, 2, 3, 4 and 8 rows, and 16"
    assert sum(counts.values()) <= 10


@pytest.mark.parametrize("shape", [(6, 1, WIDTH), (6, WIDTH)])
def test_a_batch_of_one_position_each_is_not_padded(machine: Machine, shape: tuple[int, ...]) -> None:
    products.multiply(mx.zeros(shape, mx.float16), weight_of(3, 64, WIDTH)[0], "cuda")
    assert any(constants.get("COUNT") == 6 for variants in machine.variants.values() for constants, _ in variants)


def test_joining_parts_of_attention_takes_one_kernel_for_all_prompts(machine: Machine) -> None:
    head = HeadCode.of(lloyd_max(3), 64, None, 1, 64)
    tokens = mx.zeros((1, 2, 512, 6), mx.uint32), mx.zeros((1, 2, 512, 1), mx.float16)
    kind = Kind(head, head, 0.1, causal=True, gpu="cuda")
    for n in LENGTHS:
        q = mx.zeros((1, 4, n, 64), mx.float16)
        gpu_attention.attend(q, tokens, tokens, kind, length=500, bias=None, sinks=None)
    assert len(machine.variants["turboquant_attention_parts"]) == 1
    assert sum(map(len, machine.variants.values())) <= 4


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
