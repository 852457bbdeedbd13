import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import ShapeError, dequantize, quantize, unpack, use_backend

# Lloyd-Max values of N(0, 1), from the published tables.
CODEBOOKS = {
    2: (-1.510418, -0.452780, 0.452780, 1.510418),
    3: (-2.151946, -1.343909, -0.756005, -0.245094, 0.245094, 0.756005, 1.343909, 2.151946),
    4: (-2.732590, -2.069017, -1.618046, -1.256231, -0.942340, -0.656759, -0.388048, -0.128395,
        0.128395, 0.388048, 0.656759, 0.942340, 1.256231, 1.618046, 2.069017, 2.732590),
}  # fmt: skip
SEARCHED = {2: 0.1111, 3: 0.0293, 4: 0.0070}
RMS = {2: 0.1146, 3: 0.0334, 4: 0.0091}
GAUSSIAN = mx.random.normal((512, 1024), key=mx.random.key(0))


def _error(x: mx.array, bits: int, group_size: int, search: bool) -> float:
    packed, scales = quantize(x, CODEBOOKS[bits], group_size, search)
    return (mx.square(dequantize(packed, scales, CODEBOOKS[bits]) - x).mean() / mx.square(x).mean()).item()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_errors_on_gaussian_groups_of_64_are_the_measured_ones(bits: int) -> None:
    assert _error(GAUSSIAN, bits, 64, search=True) == pytest.approx(SEARCHED[bits], rel=0.02)
    assert _error(GAUSSIAN, bits, 64, search=False) == pytest.approx(RMS[bits], rel=0.02)


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 64), (4, 128), (3, 0)])
def test_the_cpu_kernel_loses_no_more_than_the_reference(bits: int, group_size: int, search: bool) -> None:
    x = GAUSSIAN[:32, :384]
    with use_backend("reference"):
        expected = _error(x, bits, group_size, search)
    assert _error(x, bits, group_size, search) == pytest.approx(expected, rel=1e-4)


def test_each_code_is_the_nearest_one() -> None:
    x = GAUSSIAN[:8, :64]
    packed, scales = quantize(x, CODEBOOKS[3], 64)
    nearest = np.abs(np.array(x)[..., None] / np.array(scales.astype(mx.float32))[..., None] - CODEBOOKS[3]).argmin(-1)
    assert np.array_equal(np.array(unpack(packed, 3, 64)), nearest)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_zeros_stay_zeros_and_great_outliers_stay_finite(backend: str) -> None:
    x = mx.zeros((2, 64))
    with use_backend(backend):
        packed, scales = quantize(x, CODEBOOKS[4], 64)
        assert mx.array_equal(dequantize(packed, scales, CODEBOOKS[4]), x)
        spiked = mx.concatenate([x[:, :63], mx.full((2, 1), 1e4)], axis=1)
        packed, scales = quantize(spiked, CODEBOOKS[4], 64)
        values = dequantize(packed, scales, CODEBOOKS[4])
    assert mx.isfinite(values).all()
    assert values[0, 63].item() == pytest.approx(1e4, rel=0.15)


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ShapeError, match=r"it must be \(rows, width\)"):
        quantize(mx.zeros((2, 3, 64)), CODEBOOKS[3], 64)
    with pytest.raises(ShapeError, match="groups of 64 do not divide a width of 96"):
        quantize(mx.zeros((2, 96)), CODEBOOKS[3], 64)
