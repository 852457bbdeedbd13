import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import (
    AffineWeight,
    DenseWeight,
    PackedWeight,
    ShapeError,
    hadamard_block,
    matmul,
    quantize,
    rotate,
    unrotate,
    use_backend,
)
from metal_kernels import dequantize as dequantize_rotated
from metal_kernels.cpu import lanes, llvm_vector
from metal_kernels.cpu.products import packed_product
from tests.metal_kernels.test_quantize import CODEBOOKS

SHAPES = [
    (2, 512, 64),
    (3, 512, 64),
    (4, 512, 64),
    (3, 256, 128),
    (3, 704, 32),
    (4, 96, 32),
    (3, 320, 0),
    (2, 2880, 64),
]


def _weight(bits: int, width: int, group_size: int, rows: int) -> tuple[tuple, np.ndarray]:
    """The arguments of a PackedWeight and its values as float64 (rows, width), not rotated."""
    signs = mx.array(np.random.default_rng(width).choice([-1.0, 1.0], width).astype(np.float32))
    block = hadamard_block(width)
    w = mx.random.normal((rows, width), key=mx.random.key(bits))
    with use_backend("reference"):
        packed, scales = quantize(rotate(w, signs, block), CODEBOOKS[bits], group_size)
        values = unrotate(dequantize_rotated(packed, scales, CODEBOOKS[bits]), signs, block)
    return (packed, scales, CODEBOOKS[bits], signs, block), np.array(values, dtype=np.float64)


def _half_precision_error(x: np.ndarray, w: np.ndarray) -> float:
    """The greatest error of the same product with both factors rounded to float16: what users accept today."""
    rounded = x.astype(np.float16).astype(np.float64) @ w.astype(np.float16).astype(np.float64).T
    return float(np.abs(rounded - x @ w.T).max())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("bits", "width", "group_size"), SHAPES)
@pytest.mark.parametrize("n", [1, 12])
def test_packed_products_equal_float64(backend: str, bits: int, width: int, group_size: int, n: int) -> None:
    arguments, values = _weight(bits, width, group_size, rows=37)
    x = mx.random.normal((n, width), key=mx.random.key(7))
    exact = np.array(x, dtype=np.float64) @ values.T
    with use_backend(backend):
        y = matmul(x, PackedWeight(*arguments))
    assert y.dtype == mx.float32
    assert np.abs(np.array(y) - exact).max() < 0.2 * _half_precision_error(np.array(x, dtype=np.float64), values)


@pytest.mark.parametrize("n", [2, 3, 5, 8, 9])
@pytest.mark.parametrize("rows", [1, 3, 6])
def test_any_number_of_rows_on_either_side(n: int, rows: int) -> None:
    arguments, values = _weight(3, 512, 64, rows)
    x = mx.random.normal((n, 512), key=mx.random.key(n))
    assert np.allclose(np.array(matmul(x, PackedWeight(*arguments))), np.array(x) @ values.T, atol=1e-4)


@pytest.mark.parametrize("lookup", llvm_vector.available_lookups())
@pytest.mark.parametrize(("bits", "width"), [(3, 512), (4, 256)])
def test_every_instruction_set_gives_the_same(lookup: int, bits: int, width: int) -> None:
    rng = np.random.default_rng(bits)
    packed = rng.integers(0, 2**32, (9, width * bits // 32), dtype=np.uint32)
    scales = rng.random((9, width // 64)).astype(np.float16)
    weight = lanes.arrange(packed, scales, CODEBOOKS[bits])
    x = rng.normal(size=(9, width)).astype(np.float32)
    values = np.array(dequantize_rotated(mx.array(packed), mx.array(scales), CODEBOOKS[bits]))
    ordered = lanes.in_lane_order(x, weight.lanes)
    assert np.allclose(packed_product(ordered[:1], weight, lookup), x[:1] @ values.T, atol=1e-4)
    assert np.allclose(packed_product(ordered, weight, lookup), x @ values.T, atol=1e-4)


@pytest.mark.parametrize(("bits", "width", "group_size"), SHAPES)
def test_the_lane_layout_gives_the_codes_back(bits: int, width: int, group_size: int) -> None:
    arguments, _ = _weight(bits, width, group_size, rows=5)
    packed, scales = PackedWeight(*arguments).canonical()
    assert mx.array_equal(packed, arguments[0])
    assert mx.array_equal(scales, arguments[1])


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("n", [1, 3, 20])
@pytest.mark.parametrize("width", [100, 512])
def test_dense_products_equal_float64(dtype: mx.Dtype, n: int, width: int) -> None:
    w = mx.random.normal((11, width), key=mx.random.key(2)).astype(dtype)
    x = mx.random.normal((2, n, width), key=mx.random.key(3))
    exact = np.array(x, dtype=np.float64) @ np.array(w.astype(mx.float32), dtype=np.float64).T
    assert np.allclose(np.array(matmul(x, DenseWeight(w))), exact, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_affine_products_equal_mlx(bits: int) -> None:
    w = mx.random.normal((24, 256), key=mx.random.key(4))
    packed, scales, biases = mx.quantize(w, group_size=64, bits=bits)
    x = mx.random.normal((3, 256), key=mx.random.key(5))
    weight = AffineWeight(packed, scales, biases, bits, 64)
    values = np.array(mx.dequantize(packed, scales, biases, 64, bits), dtype=np.float64)
    assert np.allclose(np.array(matmul(x, weight)), np.array(x) @ values.T, atol=1e-4)
    with use_backend("reference"):
        assert np.allclose(np.array(matmul(x, weight)), np.array(x) @ values.T, atol=1e-4)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_results_take_the_activations_dtype_and_shape(dtype: mx.Dtype) -> None:
    arguments, _ = _weight(3, 512, 64, rows=8)
    assert matmul(mx.ones((2, 3, 512), dtype=dtype), PackedWeight(*arguments)).dtype == dtype
    assert matmul(mx.ones((2, 3, 512), dtype=dtype), PackedWeight(*arguments)).shape == (2, 3, 8)


def test_the_same_product_gives_the_same_bits() -> None:
    arguments, _ = _weight(3, 512, 64, rows=64)
    x, weight = mx.random.normal((1, 512), key=mx.random.key(9)), PackedWeight(*arguments)
    first = matmul(x, weight)
    assert all(mx.array_equal(matmul(x, weight), first) for _ in range(20))


def test_weights_and_activations_that_do_not_fit_are_named() -> None:
    packed, scales, codebook, signs, block = _weight(3, 512, 64, rows=8)[0]
    with pytest.raises(ShapeError, match="the last axis must be 512"):
        matmul(mx.ones((1, 256)), PackedWeight(packed, scales, codebook, signs, block))
    with pytest.raises(ShapeError, match="they must be uint32 words"):
        PackedWeight(packed.astype(mx.int32), scales, codebook, signs, block)
    with pytest.raises(ShapeError, match="they must be float16"):
        PackedWeight(packed, scales.astype(mx.float32), codebook, signs, block)
    with pytest.raises(ShapeError, match="groups of 256"):
        PackedWeight(packed, scales[:, :2], codebook, signs, block)
