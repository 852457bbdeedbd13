import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import ShapeError, swiglu, use_backend


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("shape", [(1, 1, 7), (2, 3, 5000)])
def test_swiglu_equals_float64(backend: str, shape: tuple[int, ...]) -> None:
    gate = 10 * mx.random.normal(shape, key=mx.random.key(0))
    up = mx.random.normal(shape, key=mx.random.key(1))
    g, u = np.array(gate, dtype=np.float64), np.array(up, dtype=np.float64)
    with use_backend(backend):
        y = np.array(swiglu(gate, up))
    assert y.shape == shape
    assert np.allclose(y, g / (1 + np.exp(-g)) * u, rtol=2e-6, atol=1e-6)


def test_extreme_gates_neither_overflow_nor_lose_their_sign() -> None:
    gate = mx.array([1e4, 100.0, 0.0, -100.0, -1e4])
    assert np.allclose(np.array(swiglu(gate, mx.ones(5))), [1e4, 100.0, 0.0, 0.0, 0.0], atol=1e-30)


def test_shapes_must_agree() -> None:
    with pytest.raises(ShapeError, match="they must be the same"):
        swiglu(mx.ones((2, 3)), mx.ones((3, 2)))
