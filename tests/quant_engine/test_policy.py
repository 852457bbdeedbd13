import pytest

from quant_engine.config import QuantConfig
from quant_engine.errors import RecipeError
from quant_engine.policy import Decision, decide

CONFIG = QuantConfig(bits=2)


def test_linear_layers_get_the_recipes_bits() -> None:
    assert decide("model.layers.0.mlp.gate_proj", (256, 128), CONFIG) == Decision(True, 2)


@pytest.mark.parametrize(
    ("path", "shape", "reason"),
    [
        ("model.embed_tokens", (1000, 128), "embeddings"),
        ("lm_head", (1000, 128), "output projection"),
        ("model.layers.0.mlp.gate", (8, 128), "router"),
        ("model.layers.0.mlp.shared_expert_gate", (1, 128), "router"),
        ("model.layers.0.input_layernorm", (128,), "norm"),
        ("model.layers.0.linear_attn.conv1d", (128, 4, 1), "convolution"),
        ("model.layers.0.self_attn.sinks", (8,), "not a matrix"),
    ],
)
def test_what_is_kept_says_why(path: str, shape: tuple[int, ...], reason: str) -> None:
    assert decide(path, shape, CONFIG) == Decision(False, 0, reason)


def test_a_width_that_does_not_fit_is_refused_by_the_modules_name() -> None:
    with pytest.raises(RecipeError, match=r"^model\.layers\.0\.mlp\.down_proj: a width of 172 is not a multiple of 32"):
        decide("model.layers.0.mlp.down_proj", (64, 172), CONFIG)
    with pytest.raises(
        RecipeError, match=r"down_proj: group_size 64 does not divide a width of 96.*0 \(one scale a row\), 32"
    ):
        decide("down_proj", (64, 96), CONFIG)
    with pytest.raises(RecipeError, match="down_proj: no Hadamard matrix of 2880"):
        decide("down_proj", (64, 2880), QuantConfig(rotation="hadamard"))


def test_a_width_that_does_not_fit_is_kept_where_that_was_asked_for() -> None:
    decision = decide("mlp.down_proj", (64, 172), CONFIG, keep_unfitting=True)
    assert not decision.quantize
    assert "not a multiple of 32" in decision.reason
