"""Scores of next-token distributions against exact values computed in float64."""

import math

import mlx.core as mx
import numpy as np
import pytest

from quant_engine.errors import InputError
from quant_engine.score import log_softmax, logits_array, score

RANDOM = np.random.default_rng(3)
LOGITS = RANDOM.normal(0, 4, (150, 40)).astype(np.float32)
NEAR = LOGITS + RANDOM.normal(0, 1, LOGITS.shape).astype(np.float32)
TARGETS = RANDOM.integers(0, 40, 150)


def exact(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def test_the_sums_are_those_of_the_definitions() -> None:
    expected, scored = exact(LOGITS), exact(NEAR)
    result = score(NEAR, TARGETS, LOGITS)
    assert result.positions == 150
    assert result.nll == pytest.approx(-scored[np.arange(150), TARGETS].sum(), rel=1e-6)
    assert result.kl == pytest.approx((np.exp(expected) * (expected - scored)).sum(), rel=1e-4)
    assert result.top1 == (LOGITS.argmax(-1) == NEAR.argmax(-1)).sum()
    assert 0 < result.top1 < 150


def test_a_distribution_does_not_differ_from_itself() -> None:
    result = score(LOGITS, TARGETS, LOGITS)
    assert (result.kl, result.top1) == (0.0, 150)


def test_a_certain_and_a_uniform_prediction_cost_what_they_must() -> None:
    certain = np.full((1, 8), -1e4, np.float32)
    certain[0, 5] = 0
    assert score(certain, np.array([5])).nll == 0
    assert score(np.zeros((1, 8), np.float32), np.array([5])).nll == pytest.approx(math.log(8), rel=1e-6)


def test_without_a_reference_nothing_is_compared() -> None:
    result = score(LOGITS, TARGETS)
    assert (result.kl, result.top1) == (None, None)


def test_large_logits_do_not_overflow() -> None:
    shifted = LOGITS + np.float32(4000)
    np.testing.assert_allclose(log_softmax(shifted), exact(LOGITS), atol=2e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_predictions_that_are_no_numbers_are_an_error(bad: float) -> None:
    broken = LOGITS.copy()
    broken[100, 3] = bad
    with pytest.raises(InputError, match="not finite"):
        score(broken, TARGETS)


def test_logits_of_any_precision_become_float32() -> None:
    array = logits_array(mx.array([[1.0, 2.5]], dtype=mx.bfloat16))
    assert array.dtype == np.float32
    assert array.tolist() == [[1.0, 2.5]]
