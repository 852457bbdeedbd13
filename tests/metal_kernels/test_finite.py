"""Counting values that are no numbers."""

import numpy as np
import pytest

from metal_kernels import count_not_finite


@pytest.mark.parametrize(("dtype", "words", "exponent"), [("<f2", np.uint16, 0x7C00), ("<f4", np.uint32, 0x7F800000)])
def test_nan_and_infinities_of_either_sign_are_counted(dtype: str, words: type, exponent: int) -> None:
    values = np.random.default_rng(1).normal(size=1001).astype(dtype)
    values[3], values[4] = np.finfo(dtype).max, np.finfo(dtype).min
    assert count_not_finite(values.view(words), exponent) == 0
    values[[0, 17, 998, 1000]] = [np.inf, -np.inf, np.nan, -np.nan]
    assert count_not_finite(values.view(words), exponent) == 4
    assert count_not_finite(values[:0].view(words), exponent) == 0
