from dataclasses import replace
from typing import Any

import pytest

from quant_engine.architecture import Architecture
from quant_engine.config import QuantConfig
from quant_engine.errors import RecipeError
from quant_engine.policy import Decision, Policy, check_effect, check_wishes

CONFIG = QuantConfig(bits=2)


def test_linear_layers_get_the_recipes_bits() -> None:
    assert Policy(CONFIG).decide("model.layers.0.mlp.gate_proj", (256, 128)) == Decision(True, 2)


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
        ("model.layers.0.linear_attn.in_proj_a", (8, 128), "state-space parameters"),
    ],
)
def test_what_is_kept_says_why(path: str, shape: tuple[int, ...], reason: str) -> None:
    assert Policy(CONFIG).decide(path, shape) == Decision(False, 0, reason)


def test_a_width_that_does_not_fit_is_refused_by_the_modules_name() -> None:
    with pytest.raises(RecipeError, match=r"^model\.layers\.0\.mlp\.down_proj: a width of 172 is not a multiple of 32"):
        Policy(CONFIG).decide("model.layers.0.mlp.down_proj", (64, 172))
    with pytest.raises(
        RecipeError, match=r"down_proj: group_size 64 does not divide a width of 96.*0 \(one scale a row\), 32"
    ):
        Policy(CONFIG).decide("down_proj", (64, 96))
    with pytest.raises(RecipeError, match="down_proj: no Hadamard matrix of 2880"):
        Policy(QuantConfig(rotation="hadamard")).decide("down_proj", (64, 2880))


def test_a_width_that_does_not_fit_is_kept_where_that_was_asked_for() -> None:
    decision = Policy(CONFIG).decide("mlp.down_proj", (64, 172), keep_unfitting=True)
    assert not decision.quantize
    assert "not a multiple of 32" in decision.reason


EXPERT = "model.layers.3.mlp.switch_mlp"


@pytest.mark.parametrize(
    ("path", "shape", "settings", "bits"),
    [
        ("model.layers.3.self_attn.q_proj", (64, 64), {"attn_bits": 4}, 4),
        ("model.layers.3.linear_attn.in_proj_qkv", (64, 64), {"attn_bits": 4}, 4),
        ("model.layers.3.mlp.up_proj", (64, 64), {"attn_bits": 4, "mlp_bits": 3}, 3),
        ("model.layers.3.mlp.shared_expert.up_proj", (64, 64), {"mlp_bits": 3, "expert_bits": 4}, 3),
        (f"{EXPERT}.up_proj", (8, 64, 64), {"expert_bits": 3, "mlp_bits": 4}, 3),
        (f"{EXPERT}.down_proj", (8, 64, 64), {"expert_bits": 3}, 3),
        (f"{EXPERT}.down_proj", (8, 64, 64), {"expert_bits": 3, "expert_down_bits": 4}, 4),
        ("model.embed_tokens", (90, 64), {"embed_bits": 4}, 4),
        ("lm_head", (90, 64), {"head_bits": 3}, 3),
        ("model.layers.3.mlp.up_proj", (64, 64), {"bits_for": [("*.up_proj", 3), ("*.3.*", 4)]}, 4),
        ("model.layers.3.mlp.up_proj", (64, 64), {"mlp_bits": 3, "bits_for": [("*.up_proj", 4)]}, 4),
        ("model.layers.3.mlp.up_proj", (64, 64), {"protect_layers": 3}, 2),
    ],
)
def test_modules_get_a_width_of_their_own(
    path: str, shape: tuple[int, ...], settings: dict[str, Any], bits: int
) -> None:
    policy = Policy(QuantConfig(bits=2, group_size=32, **settings), "llama", layers=8)
    assert policy.decide(path, shape) == Decision(True, bits)


@pytest.mark.parametrize(
    ("path", "settings", "reason"),
    [
        ("model.layers.3.mlp.up_proj", {"skip": ["*.mlp.*"]}, "skipped on request"),
        ("model.layers.3.mlp.up_proj", {"bits_for": [("*.mlp.*", 16)]}, "left whole on request"),
        ("model.layers.3.mlp.up_proj", {"mlp_bits": 16}, "feed-forward, on request"),
        ("model.layers.1.mlp.up_proj", {"protect_layers": 2}, "one of the 2 layers at each end"),
        ("model.layers.6.mlp.up_proj", {"protect_layers": 2}, "one of the 2 layers at each end"),
        ("model.layers.3.mlp.gate", {"bits_for": [("*", 4)]}, "router"),
    ],
)
def test_modules_are_left_whole_on_request(path: str, settings: dict[str, Any], reason: str) -> None:
    decision = Policy(QuantConfig(**settings), "llama", layers=8).decide(path, (64, 64))
    assert not decision.quantize
    assert decision.reason.startswith(reason)


def test_modules_get_groups_of_their_own_and_the_last_pattern_counts() -> None:
    policy = Policy(QuantConfig(groups_for=(("*.mlp.*", 128), ("*.down_proj", 32))))
    paths = ("layers.0.mlp.up_proj", "layers.0.mlp.down_proj", "layers.0.self_attn.q_proj")
    assert [policy.group_size(path) for path in paths] == [128, 32, 64]


def test_a_modules_own_groups_must_divide_its_width() -> None:
    policy = Policy(QuantConfig(groups_for=(("*.down_proj", 32),)))
    assert policy.decide("layers.0.mlp.down_proj", (64, 96)).quantize
    with pytest.raises(RecipeError, match=r"layers\.0\.mlp\.up_proj: group_size 64 does not divide a width of 96"):
        policy.decide("layers.0.mlp.up_proj", (64, 96))


def test_gpt_oss_keeps_attention_unless_asked() -> None:
    path = "model.layers.0.self_attn.q_proj"
    kept = Policy(CONFIG, "gpt_oss", 8).decide(path, (64, 64))
    assert kept.reason == "attention, which gpt-oss keeps in full precision too"
    assert Policy(QuantConfig(attn_bits=4), "gpt_oss", 8).decide(path, (64, 64)) == Decision(True, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attn_bits": 5}, "attn_bits is 5; choose one of None, 2, 3, 4, 16"),
        ({"bits_for": [("x", 1)]}, "bits_for x is 1"),
        ({"groups_for": [("x", 48)]}, "groups_for x is 48; choose one of 0, 32, 64, 128"),
    ],
)
def test_widths_that_do_not_exist_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        QuantConfig(**settings)


MODEL = Architecture({}, 2, ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "lm_head"), (), ("embed",))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits_for": [("*", 3), ("zzz", 3)]}, r"bits_for has the pattern 'zzz', .* there are model\.layers\.0\.mlp\."),
        ({"groups_for": [("zzz", 32)]}, "groups_for has the pattern 'zzz'"),
        ({"skip": ["nomatch.*"]}, r"skip has the pattern 'nomatch\.\*', which matches .*up_proj, lm_head, embed,"),
        ({"expert_bits": 2}, "expert_bits is 2 and the model has no experts"),
        ({"expert_down_bits": 16}, "expert_down_bits is 16 and the model has no experts"),
    ],
)  # fmt: skip
def test_a_wish_about_nothing_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check_wishes(QuantConfig(**settings), MODEL)


def test_a_wish_about_something_is_granted() -> None:
    check_wishes(QuantConfig(skip=("lm_*",), bits_for=(("*.up_proj", 3),), groups_for=(("embed", 32),)), MODEL)
    check_wishes(QuantConfig(expert_bits=2), replace(MODEL, experts=("model.layers.0.mlp.switch_mlp.up_proj",)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"protect_layers": 1000},
            r"^nothing is left to quantize with protect_layers = 1000: .* \(why\); change protect_layers, or use",
        ),
        (
            {"skip": ["*"], "attn_bits": 16},
            r"with attn_bits = 16 and skip = \['\*'\]: .*; change attn_bits or skip, or",
        ),
        ({"bits_for": [("*", 16)]}, "with bits_for = "),
        ({}, r"with this recipe: .* \(why\); choose a group_size that fits"),
    ],
)
def test_a_recipe_without_effect_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check_effect(QuantConfig(**settings), {}, {"a": "why", "b": "why"})
    check_effect(QuantConfig(**settings), {"a": 1}, {"b": "why"})
