"""What integers could get wrong: sums near their limit, activations of very different sizes, numbers that are none."""

import numpy as np
import pytest

from metal_kernels.cpu.integer_product import TABLE_MOST, fits, integer_product, integer_table
from metal_kernels.cpu.lanes import LaneWeight, arrange, in_lane_order
from tests.metal_kernels.test_quantize import CODEBOOKS

WIDTH, ROWS = 1024, 7
BITS = (2, 3, 4)


def _weight(codes: np.ndarray, bits: int, groups: int = 16) -> tuple[LaneWeight, np.ndarray]:
    """A matrix of codes (rows, width) with scales of 0.5, and its values in float64."""
    bit = (codes[..., None] >> np.arange(bits)) & 1
    packed = np.packbits(bit.reshape(len(codes), -1).astype(np.uint8), axis=1, bitorder="little").view(np.uint32)
    weight = arrange(packed, np.full((len(codes), groups), 0.5, np.float16), CODEBOOKS[bits])
    if not fits(weight):
        pytest.skip("this processor has no 16-bit lanes of 512 bits")
    return weight, 0.5 * np.array(CODEBOOKS[bits])[codes]


def _product(x: np.ndarray, weight: LaneWeight) -> np.ndarray:
    return integer_product(in_lane_order(x.astype(np.float32)[None], weight.lanes), weight)[0]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("groups", [32, 16, 8, 1])
def test_the_largest_sums_fit(bits: int, groups: int) -> None:
    codes = np.full((ROWS, WIDTH), 2**bits - 1)
    codes[1::2] = 0
    weight, values = _weight(codes, bits, groups)
    for x in (np.full(WIDTH, 3.0), -np.full(WIDTH, 3.0), np.eye(1, WIDTH)[0] * 1e30):
        assert np.allclose(_product(x, weight), values @ x, rtol=1e-3)


@pytest.mark.parametrize("bits", BITS)
def test_small_lanes_keep_their_precision_beside_large_ones(bits: int) -> None:
    rng = np.random.default_rng(bits)
    weight, values = _weight(rng.integers(0, 2**bits, (ROWS, WIDTH)), bits)
    sizes = np.repeat(10.0 ** rng.integers(-20, 20, WIDTH // 32), 32)
    for lane in range(0, WIDTH, 32):
        x = np.zeros(WIDTH)
        x[lane : lane + 32] = rng.normal(size=32) * sizes[lane : lane + 32]
        exact = values @ x
        assert np.abs(_product(x, weight) - exact).max() < 1e-3 * np.abs(exact).max()
    x = rng.normal(size=WIDTH) * sizes
    assert np.abs(_product(x, weight) - values @ x).max() < 1e-3 * np.abs(values @ x).max()


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_none_spoils_the_result(number: float) -> None:
    weight, _ = _weight(np.random.default_rng(0).integers(0, 8, (ROWS, WIDTH)), 3)
    x = np.ones(WIDTH)
    x[300] = number
    assert np.isnan(_product(x, weight)).all()


def test_what_vanishes_gives_zero() -> None:
    weight, _ = _weight(np.random.default_rng(0).integers(0, 8, (ROWS, WIDTH)), 3)
    assert np.array_equal(_product(np.zeros(WIDTH), weight), np.zeros(ROWS))
    assert np.abs(_product(np.full(WIDTH, 2.0**-120), weight)).max() <= 1e-30


@pytest.mark.parametrize("bits", BITS)
def test_a_table_in_integers_is_the_table(bits: int) -> None:
    table = np.tile(np.array(CODEBOOKS[bits], np.float32), 16 // 2**bits)
    integers, one = integer_table(table.tobytes())
    assert integers.dtype == np.int16
    assert TABLE_MOST // 2 <= np.abs(integers).max() <= TABLE_MOST
    assert np.abs(integers * one - np.tile(table, 2)).max() <= np.abs(table).max() / TABLE_MOST
