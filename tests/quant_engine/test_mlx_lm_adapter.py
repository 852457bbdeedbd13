import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import base, llama
from mlx_lm.models.cache import QuantizedKVCache
from mlx_lm.utils import load_model

from quant_engine import mlx_lm_adapter as adapter
from quant_engine.convert import convert
from quant_engine.errors import UnsupportedModelError
from quant_engine.loader import load
from quant_engine.source import resolve

CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 50, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
TOKENS = mx.array([[1, 7, 3, 9, 2]])


def test_what_mlx_lm_has_a_model_for_is_known() -> None:
    assert adapter.supports(CONFIG)
    assert not adapter.supports({"model_type": "no_such_architecture"})
    assert not adapter.supports({})


def test_linear_layers_are_found_by_path_and_replaced() -> None:
    model = adapter.build(CONFIG)
    layers = adapter.linear_modules(model)
    assert len(layers) == 2 * 7 + 1
    assert isinstance(layers["model.layers.1.mlp.down_proj"], nn.Linear)
    adapter.replace_modules(model, {"model.layers.1.mlp.down_proj": nn.Identity()})
    assert "model.layers.1.mlp.down_proj" not in adapter.linear_modules(model)
    assert "model.layers.0.mlp.down_proj" in adapter.linear_modules(model)


def test_layers_that_share_an_input_are_grouped_in_a_fixed_order() -> None:
    paths = [f"model.layers.0.self_attn.{n}_proj" for n in "vkqo"] + ["model.layers.0.mlp.up_proj"]
    assert adapter.shared_inputs(paths) == [tuple(f"model.layers.0.self_attn.{n}_proj" for n in "qkv")]


def test_routing_changes_this_model_and_no_other() -> None:
    mx.random.seed(0)
    ours, theirs = adapter.build(CONFIG), adapter.build(CONFIG)
    theirs.update(ours.parameters())
    assert adapter.route(ours) == 4
    assert llama.scaled_dot_product_attention is base.scaled_dot_product_attention
    assert type(theirs.layers[0].self_attn) is llama.Attention
    assert isinstance(ours.layers[0].self_attn, llama.Attention)
    assert mx.allclose(ours(TOKENS), theirs(TOKENS), atol=1e-5)


def test_a_cache_that_attends_is_asked_for_attention() -> None:
    class Attending:
        def attend(self, queries: mx.array, *, scale: float, mask: object, sinks: object = None) -> mx.array:
            return queries * scale

    queries = mx.ones((1, 2, 3, 4))
    assert mx.array_equal(adapter.attention(queries, queries, queries, Attending(), 0.5, None), queries * 0.5)


def test_mlx_lms_own_quantized_cache_still_works(demo_model: Path) -> None:
    ours, theirs = (adapter.load_float(demo_model, resolve(demo_model).config) for _ in range(2))
    ours.set_dtype(mx.float32), theirs.set_dtype(mx.float32)
    adapter.route(ours)
    caches = [[QuantizedKVCache(group_size=64, bits=8) for _ in theirs.layers] for _ in range(2)]
    assert mx.allclose(ours(TOKENS, cache=caches[0]), theirs(TOKENS, cache=caches[1]), atol=2e-3)


def test_the_backbone_is_the_model_without_its_output_projection() -> None:
    model = adapter.build(CONFIG)
    inner = adapter.backbone(model)
    assert inner is not None
    assert inner(TOKENS).shape == (1, 5, 64)
    assert adapter.backbone(nn.Linear(4, 4)) is None


def test_weights_that_do_not_fit_are_named() -> None:
    model = adapter.build(CONFIG)
    weights = dict(tree_flatten(model.parameters()))
    adapter.set_parameters(model, weights)
    lost = weights.pop("model.norm.weight")
    with pytest.raises(UnsupportedModelError, match=r"missing model\.norm\.weight"):
        adapter.set_parameters(model, weights)
    with pytest.raises(UnsupportedModelError, match="unexpected extra"):
        adapter.set_parameters(model, {**weights, "model.norm.weight": lost, "extra": lost})


class TestPrograms:
    """mlx-lm's own commands on models that another function opens."""

    def test_generate_runs_on_what_it_is_given(
        self, demo_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[tuple[str, dict[str, Any]]] = []

        def open_model(model: str, settings: Mapping[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
            asked.append((model, dict(settings)))
            return *load(demo_model), {}

        monkeypatch.setattr(sys, "argv", before := ["caller"])
        module = importlib.import_module("mlx_lm.generate")
        names = dict(vars(module))
        adapter.run_program("generate", ["--model", "any", "--prompt", "The river", "--max-tokens", "2"], open_model)
        assert asked == [("any", {})]
        assert "Generation: 2 tokens" in capsys.readouterr().out
        assert sys.argv is before
        assert {name for name, value in vars(module).items() if names.get(name) is not value} == set()

    @pytest.mark.parametrize("option", [["--adapter-path", "lora"], ["--quantize-activations"]])
    def test_what_these_models_have_not_is_refused(self, option: list[str]) -> None:
        def never(model: str, settings: Mapping[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
            raise AssertionError

        with pytest.raises(UnsupportedModelError, match="takes no adapters"):
            adapter.run_program("generate", ["--model", "m", "--prompt", "p", *option], never)

    def test_plain_mlx_lm_refuses_a_converted_model_and_does_not_misread_it(
        self, demo_model: Path, tmp_path: Path
    ) -> None:
        convert(demo_model, tmp_path / "out")
        with pytest.raises(ValueError, match="Missing"):
            load_model(tmp_path / "out")
