"""Products that turn their activations themselves, on a GPU or the emulated one, against the reference's steps."""

from pathlib import Path

import mlx.core as mx
import pytest

from metal_kernels import quantize, reference
from metal_kernels.gpu import matvec, tiles, turned_product
from metal_kernels.gpu.tiles import TileWeight
from metal_kernels.gpu.turned_product import Norm
from quant_engine.codebook import lloyd_max
from quant_engine.rotation import choose_block, signs
from tests.metal_kernels.host.machine import on_machine

ROWS = 40
BOUND = {mx.float16: 3e-3, mx.float32: 1e-3, mx.bfloat16: 1.6e-2}


def weight_of(
    bits: int,
    group: int,
    width: int,
    block: int | None = None,
    rows: int = ROWS,
    gpu: turned_product.Dialect = "cuda",
) -> tuple[TileWeight, mx.array]:
    """A weight in tiles, and the matrix (rows, width) that its codes stand for, in the original domain."""
    matrix = mx.random.normal((rows, width), key=mx.random.key(bits)) / width**0.5
    block, turn = block or choose_block(width, "auto"), mx.array(signs(width, 3))
    turn = turn if block > 1 else None
    packed, scales = quantize(reference.rotate(matrix, turn, block), lloyd_max(bits), group)
    values = reference.unrotate(reference.dequantize(packed, scales, lloyd_max(bits)), turn, block)
    return tiles.arrange(packed, scales, lloyd_max(bits), gpu, turn, block), values


def activations(n: int, width: int, dtype: mx.Dtype) -> mx.array:
    return (3 * mx.random.normal((n, width), key=mx.random.key(n))).astype(dtype)


@pytest.mark.parametrize(("dtype", "n"), [(mx.float16, 1), (mx.bfloat16, 3), (mx.float32, 2)], ids=str)
@pytest.mark.parametrize("gpu", ["metal", "cuda"])
def test_every_kind_of_weight(tmp_path: Path, dtype: mx.Dtype, n: int, gpu: turned_product.Dialect) -> None:
    made = [weight_of(bits, group, 384, gpu=gpu) for bits in (2, 3, 4) for group in (32, 64, 128, 0)]
    x = activations(n, 384, dtype)
    found = on_machine(tmp_path, lambda: [turned_product.turned_product(x, weight, gpu) for weight, _ in made])
    for (weight, values), y in zip(made, found, strict=True):
        expected = x.astype(mx.float32) @ values.T
        assert y.dtype == dtype
        off = mx.abs(y.astype(mx.float32) - expected).max() / mx.abs(expected).max()
        assert off < BOUND[dtype], (weight.bits, weight.group)


@pytest.mark.parametrize(
    ("width", "block"),
    [*((width, None) for width in (64, 288, 512, 768, 896, 2048, 2880)), (576, 1), (2048, 1), (1024, 128)],
)
def test_every_kind_of_rotation_and_a_run_of_several_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int, block: int | None
) -> None:
    monkeypatch.setattr(turned_product, "RESIDENT", 1)
    weight, values = weight_of(3, 32, width, block)
    x = activations(2, width, mx.bfloat16)
    assert turned_product.fits(2, x.dtype, weight, "metal")
    (y,) = on_machine(tmp_path, lambda: [turned_product.turned_product(x, weight, "cuda")])
    expected = x.astype(mx.float32) @ values.T
    assert mx.abs(y.astype(mx.float32) - expected).max() < BOUND[mx.bfloat16] * mx.abs(expected).max()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_norms_gates_and_residuals_round_as_their_own_steps_do(tmp_path: Path, dtype: mx.Dtype) -> None:
    weight, values = weight_of(4, 64, 320, rows=64)
    norm = Norm((1 + 0.2 * mx.random.normal((320,), key=mx.random.key(5))).astype(dtype), 1e-5)
    x, added, bias = activations(2, 320, dtype), activations(2, 64, dtype), activations(1, 64, dtype)

    def run() -> list[mx.array]:
        return [
            turned_product.turned_product(x, weight, "cuda", norm=norm, added=added),
            turned_product.turned_product(x, weight, "cuda", added=bias),
            turned_product.turned_product(x, weight, "cuda", norm=norm, gates=True),
        ]

    product = norm(x).astype(mx.float32) @ values.T
    gates, ups = product.astype(dtype).split(2, axis=-1)
    rights = [product + added, x.astype(mx.float32) @ values.T + bias, gates * mx.sigmoid(gates) * ups]
    for found, expected in zip(on_machine(tmp_path, run), rights, strict=True):
        assert found.shape == expected.shape
        assert mx.abs(found.astype(mx.float32) - expected).max() < BOUND[dtype] * mx.abs(expected).max()


@pytest.mark.parametrize("gpu", ["metal", "cuda"])
def test_a_few_outputs_with_something_to_add(tmp_path: Path, gpu: turned_product.Dialect) -> None:
    weight, values = weight_of(4, 64, 320, rows=4, gpu=gpu)
    x, added = activations(1, 320, mx.float16), activations(1, 4, mx.float16)
    (y,) = on_machine(tmp_path, lambda: [turned_product.turned_product(x, weight, gpu, added=added)])
    expected = x.astype(mx.float32) @ values.T + added
    assert mx.abs(y - expected).max() < BOUND[mx.float16] * mx.abs(expected).max()


@pytest.mark.parametrize("gpu", ["metal", "cuda"])
@pytest.mark.parametrize(("dtype", "group"), [(mx.float16, 64), (mx.float32, 0)], ids=str)
def test_simdgroups_cross_from_gates_to_ups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: mx.Dtype, group: int, gpu: turned_product.Dialect
) -> None:
    """One threadgroup takes 5 pairs of tiles of 3 blocks on CUDA; its fourth simdgroup has blocks 12 to 15."""
    monkeypatch.setattr(turned_product, "RESIDENT", 8)
    weight, values = weight_of(3, group, 768, rows=160, gpu=gpu)
    shared = matvec.Shares(1, 8, 2) if gpu == "cuda" else matvec.Shares(2, 4, 3)
    assert turned_product.shares_of(1, dtype, weight, gpu, gates=True) == shared
    x = activations(1, 768, dtype)
    (y,) = on_machine(tmp_path, lambda: [turned_product.turned_product(x, weight, gpu, gates=True)])
    gates, ups = (x.astype(mx.float32) @ values.T).split(2, axis=-1)
    expected = gates * mx.sigmoid(gates) * ups
    assert mx.abs(y.astype(mx.float32) - expected).max() < BOUND[dtype] * mx.abs(expected).max()


def test_what_does_not_fit_threadgroup_memory_is_left_to_two_kernels() -> None:
    weight = weight_of(2, 64, 2048)[0]
    assert turned_product.fits(4, mx.float16, weight, "cuda")
    assert not turned_product.fits(9, mx.float16, weight, "cuda"), "more rows than one product takes"
    assert not turned_product.fits(8, mx.float16, weight, "metal"), "more memory than Metal has"
