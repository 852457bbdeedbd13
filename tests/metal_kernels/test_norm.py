"""Normalised rows equal their definition in float64."""

import mlx.core as mx
import numpy as np
import pytest

import metal_kernels
from metal_kernels import ShapeError, rms_norm


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("shape", [(1, 2048), (3, 5, 96), (40, 2048), (2, 7, 4, 32)])
def test_rows_are_normalised(backend: str, shape: tuple[int, ...]) -> None:
    x = 3 * mx.random.normal(shape, key=mx.random.key(0))
    weight = mx.random.normal(shape[-1:], key=mx.random.key(1))
    exact = np.array(x, np.float64)
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5) * np.array(weight, np.float64)
    with metal_kernels.use_backend(backend):
        y = rms_norm(x, weight, 1e-5)
    assert y.shape == shape
    assert np.allclose(np.array(y), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_the_dtype_is_kept(dtype: mx.Dtype) -> None:
    x = mx.random.normal((2, 64)).astype(dtype)
    assert rms_norm(x, mx.ones(64, dtype), 1e-5).dtype == dtype


def test_zeros_stay_zeros() -> None:
    assert not mx.any(rms_norm(mx.zeros((2, 64)), mx.ones(64), 1e-5))


def test_a_weight_of_another_width_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"\(32,\) for activations of shape \(2, 64\)"):
        rms_norm(mx.ones((2, 64)), mx.ones(32), 1e-5)
