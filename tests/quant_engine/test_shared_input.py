"""Layers that read the same input are computed once, whoever is called first."""

import mlx.core as mx

from quant_engine.config import QuantConfig
from quant_engine.experts import DenseExperts
from quant_engine.linear import DenseLinear, FastLinear, TurboQuantLinear, packed_weight
from quant_engine.quantizer import quantize_weight
from quant_engine.shared_input import branches, stack_biases

WEIGHT = mx.random.normal((24, 64), key=mx.random.key(1))
X = mx.random.normal((5, 64), key=mx.random.key(2))


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


def test_experts_that_read_the_same_input_are_stacked_for_each_expert() -> None:
    gate, up = mx.random.normal((4, 6, 64)), mx.random.normal((4, 10, 64))
    x, indices = X[:, None, None, :], mx.array([[0, 1], [2, 3], [3, 3], [1, 0], [2, 2]])
    first, second = branches(DenseExperts(mx.concatenate([gate, up], axis=1)), [6, 10])
    assert mx.allclose(first(x, indices, sorted_indices=False), DenseExperts(gate)(x, indices), atol=1e-5)
    assert mx.allclose(second(x, indices, sorted_indices=False), DenseExperts(up)(x, indices), atol=1e-5)


def test_missing_biases_are_zeros() -> None:
    assert stack_biases([None, None], [2, 3]) is None
    stacked = stack_biases([None, mx.ones((4, 3))], [2, 3])
    assert stacked is not None
    assert stacked.tolist() == [[0, 0, 1, 1, 1]] * 4
