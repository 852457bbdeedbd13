import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import DenseWeight
from quant_engine.config import QuantConfig
from quant_engine.linear import (
    AffineLinear,
    DenseLinear,
    FastEmbedding,
    TurboQuantLinear,
    packed_weight,
)
from quant_engine.quantizer import dequantize_weight, quantize_weight

WEIGHT = mx.random.normal((24, 128), key=mx.random.key(0)) / 11
BIAS = mx.random.normal((24,), key=mx.random.key(1))
X = mx.random.normal((2, 3, 128), key=mx.random.key(2))


@pytest.mark.parametrize("use_qjl", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_turboquant_layer_multiplies_by_the_dequantized_weight(bits: int, use_qjl: bool) -> None:
    quantized = quantize_weight(WEIGHT, QuantConfig(bits=bits, use_qjl=use_qjl))
    layer = TurboQuantLinear.from_quantized(quantized, BIAS)
    expected = X @ dequantize_weight(quantized).T + BIAS
    assert mx.allclose(layer(X), expected, atol=1e-4)
    assert layer.weight_nbytes == quantized.nbytes
    assert layer.shape == (24, 128)


def test_a_dense_layer_is_the_plain_product_and_keeps_its_weight() -> None:
    layer = DenseLinear(WEIGHT, BIAS)
    assert mx.allclose(layer(X), X @ WEIGHT.T + BIAS, atol=1e-5)
    assert mx.array_equal(layer.weight, WEIGHT)
    assert mx.allclose(DenseLinear(WEIGHT)(X), X @ WEIGHT.T, atol=1e-5)


def test_a_packed_layers_weight_can_be_read() -> None:
    quantized = quantize_weight(WEIGHT, QuantConfig(bits=4))
    layer = TurboQuantLinear.from_quantized(quantized)
    assert mx.allclose(layer.weight, dequantize_weight(quantized), atol=1e-5)
    affine = AffineLinear.from_dense(WEIGHT, None, bits=4, group_size=64)
    assert mx.allclose(X @ affine.weight.T, affine(X), atol=1e-4)


def test_an_affine_layer_equals_mlxs() -> None:
    packed, scales, biases = mx.quantize(WEIGHT, group_size=64, bits=4)
    expected = X @ mx.dequantize(packed, scales, biases, 64, 4).T
    layer = AffineLinear.from_dense(WEIGHT, None, bits=4, group_size=64)
    assert mx.allclose(layer(X), expected, atol=1e-5)
    assert layer.weight_nbytes == packed.nbytes + scales.nbytes + biases.nbytes


def test_an_embedding_looks_rows_up_and_projects_to_logits() -> None:
    table = WEIGHT.astype(mx.bfloat16)
    embedding = FastEmbedding(DenseWeight(table), mx.float32)
    assert embedding(mx.array([[3, 5]])).dtype == mx.float32
    assert np.array_equal(np.array(embedding(mx.array([3]))), np.array(table[3:4].astype(mx.float32)))
    assert mx.allclose(embedding.as_linear(X), X @ table.astype(mx.float32).T, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_quantized_embedding_looks_up_and_projects_with_the_same_values(bits: int) -> None:
    weight = quantize_weight(WEIGHT, QuantConfig(bits=bits))
    embedding, values = FastEmbedding(packed_weight([weight]), mx.float32), dequantize_weight(weight)
    tokens = mx.array([[3, 5, 3], [0, 23, 7]])
    assert mx.allclose(embedding(tokens), values[tokens], atol=1e-5)
    assert mx.allclose(embedding.as_linear(X), X @ values.T, atol=1e-4)
