import numpy as np
import pytest

from quant_engine.codebook import distortion, lloyd_max, uniform
from quant_engine.errors import RecipeError

EXACT = {1: 0.36338, 2: 0.11748, 3: 0.03455, 4: 0.00950}
"""Max (1960), and the distortions of arXiv 2504.19874."""


@pytest.mark.parametrize("bits", EXACT)
def test_distortion_is_that_of_the_optimal_quantizer(bits: int) -> None:
    assert distortion(lloyd_max(bits)) == pytest.approx(EXACT[bits], abs=6e-6)


@pytest.mark.parametrize("bits", EXACT)
def test_gaussian_samples_lose_the_exact_distortion_within_one_percent(bits: int) -> None:
    values, x = np.array(lloyd_max(bits)), np.random.default_rng(bits).standard_normal(1_000_000)
    rounded = values[np.searchsorted((values[1:] + values[:-1]) / 2, x)]
    assert np.square(x - rounded).mean() == pytest.approx(EXACT[bits], rel=0.01)


@pytest.mark.parametrize("bits", EXACT)
def test_the_codebook_is_ascending_and_symmetric_to_the_last_bit(bits: int) -> None:
    codebook = lloyd_max(bits)
    assert len(codebook) == 2**bits
    assert list(codebook) == sorted(codebook)
    assert all(low == -high for low, high in zip(codebook, reversed(codebook), strict=True))


@pytest.mark.parametrize("bits", EXACT)
def test_no_small_move_of_a_value_lowers_the_distortion(bits: int) -> None:
    best = lloyd_max(bits)
    for i in range(len(best)):
        for step in (-1e-4, 1e-4):
            moved = (*best[:i], best[i] + step, *best[i + 1 :])
            assert distortion(moved) > distortion(best)


def test_two_bits_are_the_values_known_in_closed_form() -> None:
    assert lloyd_max(1) == pytest.approx((-((2 / np.pi) ** 0.5), (2 / np.pi) ** 0.5), abs=1e-12)
    assert lloyd_max(2)[2:] == pytest.approx((0.4527800398, 1.5104176087), abs=1e-8)


def test_the_uniform_code_spans_minus_one_to_one_evenly() -> None:
    codebook = uniform(8)
    assert (len(codebook), codebook[0], codebook[-1]) == (256, -1.0, 1.0)
    assert codebook[130] == (130 - 127.5) / 127.5
    assert np.ptp(np.diff(codebook)) < 1e-15


@pytest.mark.parametrize("bits", [0, 5, 8])
def test_lloyd_max_of_other_widths_is_refused(bits: int) -> None:
    with pytest.raises(RecipeError, match=f"codebook of {bits} bits; choose one of 1, 2, 3, 4"):
        lloyd_max(bits)


def test_a_uniform_code_of_nine_bits_is_refused() -> None:
    with pytest.raises(RecipeError, match="uniform codebook of 9 bits"):
        uniform(9)
