import mlx.core as mx
import numpy as np
import pytest

from quant_engine.config import QuantConfig
from quant_engine.linear import (
    AffineLinear,
    DenseLinear,
    FastEmbedding,
    FastLinear,
    TurboQuantLinear,
    branches,
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
    assert mx.array_equal(layer.array, WEIGHT)
    assert mx.allclose(DenseLinear(WEIGHT)(X), X @ WEIGHT.T, atol=1e-5)


def test_an_affine_layer_equals_mlxs() -> None:
    packed, scales, biases = mx.quantize(WEIGHT, group_size=64, bits=4)
    expected = X @ mx.dequantize(packed, scales, biases, 64, 4).T
    layer = AffineLinear.from_dense(WEIGHT, None, bits=4, group_size=64)
    assert mx.allclose(layer(X), expected, atol=1e-5)
    assert layer.weight_nbytes == packed.nbytes + scales.nbytes + biases.nbytes


def test_stacked_layers_give_each_branch_its_own_rows() -> None:
    parts = [quantize_weight(WEIGHT[a:b], QuantConfig()) for a, b in ((0, 8), (8, 14), (14, 24))]
    alone = [TurboQuantLinear.from_quantized(part)(X) for part in parts]
    together = branches(FastLinear(packed_weight(parts)), [8, 6, 10])
    for order in ((0, 1, 2), (2, 0, 1)):
        results = {i: together[i](X) for i in order}
        assert all(mx.allclose(results[i], alone[i], atol=1e-5) for i in order)


def test_branches_compute_once_for_one_input_and_anew_for_another() -> None:
    calls: list[mx.array] = []

    class Counting(DenseLinear):
        def __call__(self, x: mx.array) -> mx.array:
            calls.append(x)
            return super().__call__(x)

    first, second = branches(Counting(WEIGHT), [10, 14])
    first(X), second(X)
    assert len(calls) == 1
    first(X), first(X), second(X)
    assert len(calls) == 3
    other = X + 1
    assert mx.allclose(first(other), other @ WEIGHT[:10].T, atol=1e-5)
    assert mx.allclose(second(X), X @ WEIGHT[10:].T, atol=1e-5)
    assert len(calls) == 5


def test_an_embedding_looks_rows_up_and_projects_to_logits() -> None:
    table = WEIGHT.astype(mx.bfloat16)
    embedding = FastEmbedding(table, mx.float32)
    assert embedding(mx.array([[3, 5]])).dtype == mx.float32
    assert np.array_equal(np.array(embedding(mx.array([3]))), np.array(table[3:4].astype(mx.float32)))
    assert mx.allclose(embedding.as_linear(X), X @ table.astype(mx.float32).T, atol=1e-4)
