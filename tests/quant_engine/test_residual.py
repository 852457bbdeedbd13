import mlx.core as mx
import numpy as np
import pytest

import metal_kernels
from quant_engine.residual import Residual, project

SEEDS = 1500


def _inputs(error: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Inputs along the error, across it, in between, and along one axis."""
    across = random.standard_normal(error.size)
    across -= (across @ error) / (error @ error) * error
    axis = np.eye(error.size)[0]
    return np.stack([error, across, error + across, axis]).astype(np.float32)


@pytest.mark.parametrize("width", [64, 192, 352])
@pytest.mark.parametrize("outlier", [1.0, 20.0])
def test_the_estimate_is_unbiased_over_seeds(width: int, outlier: float) -> None:
    """The mean over seeds is the product, within a confidence interval of 4 standard errors (6e-5 for each)."""
    random = np.random.default_rng(width)
    error = random.standard_normal(width).astype(np.float32)
    error[3] *= outlier
    x = _inputs(error, random)
    estimates = np.array(
        [np.array(x @ np.array(project(mx.array(error[None]), seed).dequantize()).T)[:, 0] for seed in range(SEEDS)]
    )
    standard_error = estimates.std(axis=0) / SEEDS**0.5
    bias = estimates.mean(axis=0) - x @ error
    rounding = 1e-3 * np.linalg.norm(error) * np.linalg.norm(x, axis=1)  # float16 norms
    assert np.all(np.abs(bias) < 4 * standard_error + np.array([1, 0, 0, 0]) * rounding)


@pytest.mark.parametrize("width", [64, 512])
def test_the_squared_error_is_within_the_papers_bound(width: int) -> None:
    """At most pi / 2 |r|^2 |x|^2 / d for each product (arXiv 2504.19874, lemma 4); here about a third of it."""
    random = np.random.default_rng(0)
    errors = random.standard_normal((400, width)).astype(np.float32)
    x = random.standard_normal((1, width)).astype(np.float32)
    estimate = np.array(project(mx.array(errors), 5).apply(mx.array(x)))[0]
    scaled = np.square(estimate - errors @ x[0]) / np.square(errors).sum(1) / np.square(x).sum() * width
    assert scaled.mean() < np.pi / 2
    assert scaled.mean() == pytest.approx(np.pi / 2 - 1, rel=0.2)


def test_an_input_along_the_error_is_estimated_exactly_up_to_float16() -> None:
    error = mx.random.normal((3, 256), key=mx.random.key(1))
    estimate = project(error, 0).apply(error)
    np.testing.assert_allclose(np.diag(np.array(estimate)), np.square(np.array(error)).sum(1), rtol=1e-3)


@pytest.mark.parametrize("width", [64, 352, 512, 2880])
def test_applying_is_multiplying_by_the_dequantized_matrix(width: int) -> None:
    error, x = mx.random.normal((40, width), key=mx.random.key(2)), mx.random.normal((2, 3, width))
    held = project(error, 9)
    expected = np.array(x @ held.dequantize().T)
    np.testing.assert_allclose(np.array(held.apply(x)), expected, atol=2e-5 * np.abs(expected).max())


def test_every_backend_gives_the_same_product() -> None:
    held, x = project(mx.random.normal((40, 512)), 9), mx.random.normal((5, 512))
    fast = held.apply(x)
    with metal_kernels.use_backend("reference"):
        slow = Residual(held.signs, held.norms, 512, 9).apply(x)
    np.testing.assert_allclose(np.array(fast), np.array(slow), atol=1e-4)


def test_it_takes_one_bit_a_weight_and_one_float16_a_row() -> None:
    held = project(mx.random.normal((16, 256)), 0)
    assert (held.signs.shape, held.signs.dtype) == ((16, 8), mx.uint32)
    assert (held.norms.shape, held.norms.dtype) == ((16,), mx.float16)
    assert held.nbytes == 16 * 256 // 8 + 16 * 2


def test_a_row_without_error_is_corrected_by_nothing() -> None:
    held = project(mx.zeros((2, 64)), 0)
    assert mx.all(held.apply(mx.ones((1, 64))) == 0)


def test_the_signs_differ_between_seeds() -> None:
    error = mx.random.normal((4, 256), key=mx.random.key(3))
    assert not mx.array_equal(project(error, 0).signs, project(error, 1).signs)
