"""Every architecture, from a checkpoint as it is published: against transformers in float, and quantized against that.

The chain: mlx-lm's float model gives transformers' logits, so names, shapes and fused tensors are understood; the
converted model gives the logits of that float model with dequantized weights, so codes and kernels are right. Where
torch is installed, transformers itself runs the dequantized weights too.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from quant_engine import mlx_lm_adapter as adapter
from quant_engine.config import QuantConfig
from quant_engine.convert import ConversionResult, convert
from quant_engine.loader import load_source
from quant_engine.manifest import Manifest
from quant_engine.parameters import Parameters
from quant_engine.quantizer import QuantizedWeight, dequantize_weight
from quant_engine.source import resolve
from tests.quant_engine.published import NAMES, TOKENS, stored_logits, write_published

RECIPE = QuantConfig(group_size=32)


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def published(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published(name, tmp_path_factory.mktemp(name) / "published")


@pytest.fixture(scope="module", params=[2, 3, 4])
def conversion(request: pytest.FixtureRequest, published: Path) -> ConversionResult:
    output = published.parent / f"converted-{request.param}"
    return convert(published, output, config=QuantConfig(bits=request.param, group_size=32), keep_unfitting=True)


def logits(model: Any, tokens: tuple[int, ...] = TOKENS, cache: Any = None) -> mx.array:
    return model(mx.array([tokens]), cache=cache)[0].astype(mx.float32)


def dequantized(published: Path, converted: Path) -> dict[str, mx.array]:
    """All parameters of the converted model as floats, by mlx-lm's names."""
    source = resolve(converted)
    manifest = Manifest.from_config(source.config)
    assert manifest is not None
    tensors: dict[str, mx.array] = {}
    for shard in source.shards:
        tensors |= mx.load(str(shard))
    for path, entry in manifest.modules.items():
        packed, scales = tensors.pop(f"{path}.weight"), tensors.pop(f"{path}.scales")
        flat = QuantizedWeight(
            packed.reshape(-1, packed.shape[-1]), scales.reshape(-1, scales.shape[-1]), manifest.codebook(entry.bits),
            entry.bits, entry.group_size, manifest.seed, entry.block,
        )  # fmt: skip
        tensors[f"{path}.weight"] = dequantize_weight(flat).reshape(entry.shape)
    return tensors


def test_every_architecture_has_a_reference() -> None:
    assert set(NAMES) == {
        "llama", "qwen2", "mistral", "qwen3", "qwen3_5", "qwen2_moe", "qwen3_moe", "gpt_oss", "qwen3_5_moe",
    }  # fmt: skip


def test_the_float_model_gives_transformers_logits(name: str, published: Path) -> None:
    source = resolve(published)
    model = adapter.build(source.config)
    found = Parameters(source.config, source.tensors)
    adapter.set_parameters(
        model, {n: found.rows(n, 0, p.matrix[0]).astype(mx.float32).reshape(p.shape) for n, p in found.items()}
    )
    expected = stored_logits(name)
    off = mx.abs(logits(model) - expected).max() / mx.abs(expected).max()
    assert off < 2e-4


def test_the_converted_model_gives_the_logits_of_its_dequantized_weights(
    published: Path, conversion: ConversionResult
) -> None:
    model = adapter.build(resolve(published).config)
    floats = {n: a.astype(mx.float32) for n, a in dequantized(published, conversion.path).items()}
    adapter.set_parameters(model, floats)
    expected = logits(model)
    off = mx.abs(logits(load_source(resolve(conversion.path))) - expected).max() / mx.abs(expected).max()
    assert off < 2e-4


def test_greedy_generation_is_the_same_with_and_without_a_cache(conversion: ConversionResult) -> None:
    model = load_source(resolve(conversion.path))
    steps: Iterator[Any] = generate_step(mx.array(TOKENS), model, max_tokens=6, prompt_cache=make_prompt_cache(model))
    cached = [int(token) for token, _ in steps]
    tokens = list(TOKENS)
    for _ in range(6):
        tokens.append(int(logits(model, tuple(tokens))[-1].argmax()))
    assert tokens[len(TOKENS) :] == cached


def test_what_is_quantized_and_what_is_not_is_written_down(name: str, conversion: ConversionResult) -> None:
    source = resolve(conversion.path)
    manifest = Manifest.from_config(source.config)
    assert manifest is not None
    paths = {n.rpartition(".")[0] or n for n, _ in tree_flatten(adapter.build(source.config).parameters())}
    assert paths <= set(manifest.modules) | set(manifest.excluded)
    assert all(manifest.excluded.values())
    experts = [path for path, entry in manifest.modules.items() if len(entry.shape) == 3]
    assert bool(experts) == (name.endswith("_moe") or name == "gpt_oss")
    assert not any(path.split(".")[-1] in ("gate", "router", "shared_expert_gate") for path in manifest.modules)


def test_a_mixture_of_experts_in_blocks_that_are_no_power_of_two(tmp_path: Path) -> None:
    made = convert(write_published("gpt_oss", tmp_path / "in"), tmp_path / "out", config=RECIPE)
    manifest = Manifest.from_config(json.loads((made.path / "config.json").read_text()))
    assert manifest is not None
    entry = manifest.modules["model.layers.0.mlp.experts.gate_proj"]
    assert (entry.shape, entry.block) == ((4, 288, 288), 96)
    assert "attention, which gpt-oss keeps" in manifest.excluded["model.layers.0.self_attn.q_proj"]
