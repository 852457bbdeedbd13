"""The quantized forms of one float model: which layers, how large, and what they compute."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from quant_engine.config import QuantConfig
from quant_engine.errors import RecipeError
from quant_engine.linear import DenseLinear
from quant_engine.policy import Policy
from quant_engine.variants import FloatModel, Recipe, quantize_layer

WIDTH, OUT = 128, 96


class Small(nn.Module):
    """Two layers that are quantized and a head that is not."""

    def __init__(self, kind: Any = None) -> None:
        super().__init__()
        mx.random.seed(0)
        make = kind or (lambda out, width: nn.Linear(width, out))
        self.up_proj, self.down_proj = make(OUT, WIDTH), make(WIDTH, OUT)
        self.lm_head = nn.Linear(WIDTH, 7)

    def __call__(self, x: mx.array) -> mx.array:
        return self.lm_head(self.down_proj(self.up_proj(x)))


def dense(out: int, width: int) -> DenseLinear:
    weight = (mx.random.normal((out, width)) / width**0.5).astype(mx.bfloat16)
    return DenseLinear(weight, mx.random.normal((out,)))


CONFIG = QuantConfig(bits=4, group_size=32)


def test_the_policy_chooses_the_layers() -> None:
    full = FloatModel(Small(), 10**6, Policy(CONFIG))
    assert set(full.variant().modules) == {"up_proj", "down_proj"}
    assert len(full) == 2


def test_a_model_with_nothing_to_quantize_is_refused() -> None:
    model = nn.Module()
    model.lm_head = nn.Linear(64, 64)
    with pytest.raises(RecipeError, match="quantizes no layer"):
        FloatModel(model, 10**6, Policy(CONFIG))


@pytest.mark.parametrize(
    ("method", "bits"), [("affine", 4 + 2 * 16 / 32), ("turboquant", 4 + 16 / 32), ("turboquant+qjl", None)]
)
def test_sizes_are_those_of_the_arrays(method: Any, bits: float | None) -> None:
    full = FloatModel(Small(dense), 10**6, Policy(CONFIG))
    assert full.variant().bits_per_weight == 16
    variant = full.quantized(Recipe(method, CONFIG), lambda: None)
    weights = 2 * WIDTH * OUT
    if bits is None:  # a sign for each weight and a float16 norm for each row come on top
        bits = 4 + 16 / 32 + 1 + 16 * (WIDTH + OUT) / weights
    assert variant.bits_per_weight == pytest.approx(bits)
    assert variant.size_bytes == 10**6 - 2 * weights + bits / 8 * weights


@pytest.mark.parametrize("make", [None, dense], ids=["mlx's layers", "this project's layers"])
@pytest.mark.parametrize("method", ["affine", "turboquant", "turboquant+qjl"])
def test_a_quantized_layer_is_near_its_original_and_keeps_the_bias(make: Any, method: Any) -> None:
    layer = Small(make).up_proj
    layer.bias = mx.full((OUT,), 50.0)
    x = mx.random.normal((5, WIDTH))
    exact, got = np.array(layer(x)) - 50, np.array(quantize_layer(layer, Recipe(method, CONFIG))(x)) - 50
    error = np.linalg.norm(got - exact) / np.linalg.norm(exact)
    assert 0.01 < error < 0.15


def test_variants_take_turns_in_one_model() -> None:
    full = FloatModel(Small(), 10**6, Policy(CONFIG))
    plain, worse = (
        full.variant(),
        full.quantized(Recipe("turboquant", QuantConfig(bits=2, group_size=32)), lambda: None),
    )
    x = mx.random.normal((3, WIDTH))
    first, second, third = (np.array(v.logits(x)) for v in (plain, worse, plain))
    assert (first == third).all()
    assert np.abs(first - second).max() > 0.01


def test_each_layer_is_reported() -> None:
    calls: list[int] = []
    FloatModel(Small(), 10**6, Policy(CONFIG)).quantized(Recipe("affine", CONFIG), lambda: calls.append(1))
    assert len(calls) == 2


def test_labels_name_method_and_bits() -> None:
    full = FloatModel(Small(), 10**6, Policy(CONFIG))
    assert full.variant().label == "float"
    assert full.quantized(Recipe("affine", CONFIG), lambda: None).label == "affine, 4 bits"
    assert Recipe("turboquant", CONFIG).label == "turboquant, 4 bits"


def test_a_recipe_may_give_layers_bits_and_groups_of_their_own() -> None:
    full = FloatModel(Small(dense), 10**6, Policy(CONFIG))
    mixed = QuantConfig(bits=4, group_size=32, bits_for=(("up_proj", 2),), groups_for=(("up_proj", 64),))
    modules = full.quantized(Recipe("turboquant", mixed), lambda: None).modules
    even = full.quantized(Recipe("turboquant", CONFIG), lambda: None).modules
    expected = quantize_layer(full.variant().modules["up_proj"], Recipe("turboquant", QuantConfig(bits=2)))
    x = mx.random.normal((3, WIDTH))
    assert mx.array_equal(modules["up_proj"](x), expected(x))
    assert modules["up_proj"].weight_nbytes == OUT * (WIDTH * 2 // 8 + 2 * WIDTH // 64)
    assert modules["down_proj"].weight_nbytes == even["down_proj"].weight_nbytes
