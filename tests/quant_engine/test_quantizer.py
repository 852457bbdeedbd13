import mlx.core as mx
import numpy as np
import pytest

from quant_engine import quantizer
from quant_engine.config import QuantConfig
from quant_engine.errors import RecipeError
from quant_engine.quantizer import check_width, dequantize_weight, fitting_groups, quantize_weight

SEARCHED = {2: 0.1111, 3: 0.0293, 4: 0.0070}
"""Relative squared error of a unit Gaussian in groups of 64, float16 scales of least squared error."""


def _gaussian(rows: int = 256, width: int = 512, dtype: mx.Dtype = mx.float32) -> mx.array:
    return (mx.random.normal((rows, width), key=mx.random.key(4)) * 0.02).astype(dtype)


def _relative_error(weight: mx.array, config: QuantConfig, bits: int | None = None) -> float:
    restored = dequantize_weight(quantize_weight(weight, config, bits))
    return float(mx.square(weight - restored).sum() / mx.square(weight).sum())


@pytest.mark.parametrize("bits", SEARCHED)
def test_gaussian_weights_lose_no_more_than_a_searched_scale_should(bits: int) -> None:
    assert _relative_error(_gaussian(), QuantConfig(bits=bits)) == pytest.approx(SEARCHED[bits], rel=0.03)


@pytest.mark.parametrize("bits", SEARCHED)
def test_a_searched_scale_loses_less_than_the_root_mean_square(bits: int) -> None:
    weight = _gaussian()
    searched = _relative_error(weight, QuantConfig(bits=bits))
    assert searched < _relative_error(weight, QuantConfig(bits=bits, scale="rms"))


def test_rotation_rescues_weights_with_outliers() -> None:
    weight = _gaussian()
    weight = mx.where(mx.arange(512) % 97 == 0, weight * 50, weight)
    rotated, plain = (_relative_error(weight, QuantConfig(rotation=r)) for r in ("auto", "none"))
    assert rotated < 1.1 * SEARCHED[3]
    assert plain > 1.3 * rotated


@pytest.mark.parametrize("width", [64, 96, 192, 352, 2880])
@pytest.mark.parametrize("rotation", ["auto", "none"])
def test_any_width_of_whole_words_comes_back_in_its_own_domain(width: int, rotation: str) -> None:
    config = QuantConfig(bits=4, group_size=32, rotation=rotation)
    assert _relative_error(_gaussian(32, width), config) < 0.01


@pytest.mark.parametrize(
    ("bits", "group_size", "expected"),
    [(2, 64, 2.25), (3, 64, 3.25), (4, 64, 4.25), (3, 32, 3.5), (3, 128, 3.125), (3, 0, 3 + 16 / 512)],
)
def test_bits_a_weight_are_those_of_the_bytes(bits: int, group_size: int, expected: float) -> None:
    quantized = quantize_weight(_gaussian(), QuantConfig(bits=bits, group_size=group_size))
    assert 8 * quantized.nbytes / (256 * 512) == expected
    assert quantized.shape == (256, 512)


@pytest.mark.parametrize("bits", SEARCHED)
def test_qjl_takes_one_more_bit_and_lowers_the_error_as_one_sign_a_weight_can(bits: int) -> None:
    """An unbiased sign code of the residual leaves pi / 2 - 1 of its energy."""
    weight = _gaussian()
    quantized = quantize_weight(weight, QuantConfig(bits=bits, use_qjl=True))
    assert 8 * quantized.nbytes / weight.size == bits + 16 / 64 + 1 + 16 / 512
    restored = dequantize_weight(quantized)
    error = float(mx.square(weight - restored).sum() / mx.square(weight).sum())
    assert error == pytest.approx(SEARCHED[bits] * (np.pi / 2 - 1), rel=0.05)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_weights_are_quantized_as_their_float32_values(dtype: mx.Dtype) -> None:
    weight = _gaussian(dtype=dtype)
    half, full = quantize_weight(weight, QuantConfig()), quantize_weight(weight.astype(mx.float32), QuantConfig())
    assert mx.array_equal(half.packed, full.packed)
    assert mx.array_equal(half.scales, full.scales)


def test_quantizing_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    config = QuantConfig(use_qjl=True)
    whole = quantize_weight(_gaussian(), config)
    monkeypatch.setattr(quantizer, "CHUNK_VALUES", 512 * 100)
    pieces = quantize_weight(_gaussian(), config)
    assert mx.array_equal(whole.packed, pieces.packed)
    assert mx.array_equal(whole.scales, pieces.scales)
    assert whole.residual and pieces.residual
    assert mx.array_equal(whole.residual.signs, pieces.residual.signs)


def test_the_same_seed_gives_the_same_codes_and_another_seed_others() -> None:
    first, again, other = (quantize_weight(_gaussian(), QuantConfig(seed=s)).packed for s in (1, 1, 2))
    assert mx.array_equal(first, again)
    assert not mx.array_equal(first, other)


def test_zero_and_enormous_weights_stay_finite() -> None:
    weight = mx.concatenate([mx.zeros((8, 64)), mx.full((8, 64), 1e4), _gaussian(8, 64) * 1e6])
    restored = dequantize_weight(quantize_weight(weight, QuantConfig(bits=4)))
    assert mx.all(mx.isfinite(restored))
    assert mx.all(restored[:8] == 0)


def test_groups_that_fit_a_width_are_listed() -> None:
    assert fitting_groups(2880) == [0, 32, 64]
    assert fitting_groups(4096) == [0, 32, 64, 128]
    assert fitting_groups(172) == fitting_groups(0) == []


def test_a_group_that_does_not_divide_the_width_is_refused_with_those_that_do() -> None:
    with pytest.raises(RecipeError, match=r"group_size 128 does not divide a width of 2880; the sizes that fit are 0"):
        check_width(2880, 128)
    with pytest.raises(RecipeError, match="a width of 172 is not a multiple of 32"):
        quantize_weight(mx.zeros((4, 172)), QuantConfig())
