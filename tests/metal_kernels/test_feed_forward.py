"""A feed-forward layer in one step equals its three steps."""

import mlx.core as mx
import pytest

import metal_kernels
from metal_kernels import DenseWeight, PackedWeight, feed_forward, matmul, quantize, rotate, swiglu
from quant_engine.codebook import lloyd_max
from quant_engine.rotation import choose_block, signs

WIDTH, INNER, OUT = 128, 96, 48


def dense(rows: int, width: int) -> DenseWeight:
    return DenseWeight(mx.random.normal((rows, width)) / width**0.5)


def packed(rows: int, width: int) -> PackedWeight:
    turn, block = mx.array(signs(width, 0)), choose_block(width, "auto")
    weight = rotate(mx.random.normal((rows, width)) / width**0.5, turn, block)
    return PackedWeight(*quantize(weight, lloyd_max(3), 32), lloyd_max(3), turn, block)


@pytest.mark.parametrize("make", [dense, packed])
@pytest.mark.parametrize("shape", [(1, WIDTH), (2, 3, WIDTH), (1, 30, WIDTH)])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_it_is_the_products_with_the_activation_between(make: object, shape: tuple[int, ...], backend: str) -> None:
    assert callable(make)
    x = mx.random.normal(shape)
    with metal_kernels.use_backend(backend):
        gate_up, down = make(2 * INNER, WIDTH), make(OUT, INNER)
        gate, up = mx.split(matmul(x, gate_up), 2, axis=-1)
        expected = matmul(swiglu(gate, up), down)
        y = feed_forward(x, gate_up, down)
    assert y.shape == (*shape[:-1], OUT)
    assert mx.allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_what_ran_is_recorded() -> None:
    metal_kernels.reset_paths()
    feed_forward(mx.ones((1, WIDTH)), packed(2 * INNER, WIDTH), dense(OUT, INNER))
    assert {"feed_forward", "matmul", "dense"} <= set(metal_kernels.kernel_path().partition(":")[2].split(","))
