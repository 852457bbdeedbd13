"""Every architecture, from a checkpoint as it is published: against transformers in float, and quantized against that.

The chain: mlx-lm's float model gives transformers' logits, so names, shapes and fused tensors are understood; the
converted model gives the logits of that float model with dequantized weights, so codes and kernels are right. Where
torch is installed, transformers itself runs the dequantized weights too.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from quant_engine import mlx_lm_adapter as adapter
from quant_engine.config import QuantConfig
from quant_engine.convert import convert
from quant_engine.export import export
from quant_engine.loader import load_source
from quant_engine.manifest import Manifest
from quant_engine.parameters import Parameters
from quant_engine.quantizer import QuantizedWeight, dequantize_weight
from quant_engine.source import resolve
from tests.quant_engine.published import NAMES, TOKENS, array, stored_logits, write_published

RECIPE = QuantConfig(group_size=32)
EVERY_WIDTH = {
    "llama", "qwen2", "mistral", "qwen3", "qwen3_5", "qwen2_moe", "qwen3_moe", "gpt_oss", "qwen3_5_moe",
}  # fmt: skip
FOUR_BITS = {
    "cohere2", "deepseek_v3", "gemma2", "gemma3_text", "glm4", "glm4_moe", "granite", "lfm2", "llama4", "mixtral",
    "olmo2", "olmoe", "phi3", "qwen3_5_moe_split", "qwen3_next", "smollm3", "starcoder2",
}  # fmt: skip
MIXTURES = {
    "deepseek_v3", "glm4_moe", "gpt_oss", "llama4", "mixtral", "olmoe", "qwen2_moe", "qwen3_5_moe",
    "qwen3_5_moe_split", "qwen3_moe", "qwen3_next",
}  # fmt: skip
RESHAPED = {
    "deepseek_v3", "gpt_oss", "lfm2", "llama4", "mixtral", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_split", "qwen3_next",
}  # fmt: skip
"""Published in other names or shapes than mlx-lm has, which an export keeps, so that transformers does not read it."""


class Made(NamedTuple):
    """An architecture's published checkpoint, and what it was converted to."""

    name: str
    published: Path
    converted: Path


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(
    scope="module", params=[(n, bits) for n in NAMES for bits in (2, 3, 4) if bits == 4 or n in EVERY_WIDTH]
)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    name, bits = request.param
    folder = tmp_path_factory.mktemp(name)
    published = write_published(name, folder / "published")
    recipe = QuantConfig(bits=bits, group_size=32)
    return Made(name, published, convert(published, folder / "converted", config=recipe, keep_unfitting=True).path)


def logits(model: Any, tokens: tuple[int, ...] = TOKENS, cache: Any = None) -> mx.array:
    return model(mx.array([tokens]), cache=cache)[0].astype(mx.float32)


def dequantized(converted: Path) -> dict[str, mx.array]:
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
    assert set(NAMES) == EVERY_WIDTH | FOUR_BITS


def test_the_float_model_gives_transformers_logits(name: str, tmp_path: Path) -> None:
    source = resolve(write_published(name, tmp_path / "published"))
    model = adapter.build(source.config)
    found = Parameters(source.config, source.tensors)
    adapter.set_parameters(
        model, {n: found.rows(n, 0, p.matrix[0]).astype(mx.float32).reshape(p.shape) for n, p in found.items()}
    )
    expected = stored_logits(name)
    off = mx.abs(logits(model) - expected).max() / mx.abs(expected).max()
    assert off < 2e-4


def test_experts_one_by_one_are_read_where_mlx_lm_expects_them_fused(tmp_path: Path) -> None:
    source = resolve(write_published("qwen3_5_moe_split", tmp_path / "published"))
    found = Parameters(source.config, source.tensors)
    loaded = dict(tree_flatten(adapter.load_float(source.path, source.config).parameters()))
    experts = [name for name in loaded if ".switch_mlp." in name]
    assert len(experts) == 4 * 3
    for name in experts:
        assert loaded[name].shape[0] == 8
        assert mx.array_equal(found.rows(name, 0, found[name].matrix[0]).reshape(found[name].shape), loaded[name])
        for e, part in enumerate(loaded[name]):
            original = name.replace("language_model.model", "model.language_model").replace(
                "switch_mlp", f"experts.{e}"
            )
            assert mx.array_equal(part, array(original, "BF16", part.shape))


def test_the_converted_model_gives_the_logits_of_its_dequantized_weights(made: Made) -> None:
    model = adapter.build(resolve(made.published).config)
    floats = {n: a.astype(mx.float32) for n, a in dequantized(made.converted).items()}
    adapter.set_parameters(model, floats)
    expected = logits(model)
    off = mx.abs(logits(load_source(resolve(made.converted))) - expected).max() / mx.abs(expected).max()
    assert off < 2e-4


def test_greedy_generation_is_the_same_with_and_without_a_cache(made: Made) -> None:
    model = load_source(resolve(made.converted))
    steps: Iterator[Any] = generate_step(mx.array(TOKENS), model, max_tokens=6, prompt_cache=make_prompt_cache(model))
    cached = [int(token) for token, _ in steps]
    tokens = list(TOKENS)
    for _ in range(6):
        tokens.append(int(logits(model, tuple(tokens))[-1].argmax()))
    assert tokens[len(TOKENS) :] == cached


@pytest.mark.parametrize("name", sorted({*NAMES} - RESHAPED))
def test_transformers_computes_the_same_from_the_weights_written_back(name: str, tmp_path: Path) -> None:
    torch: Any = pytest.importorskip("torch")
    transformers: Any = pytest.importorskip("transformers")
    made = convert(write_published(name, tmp_path / "published"), tmp_path / "converted", config=RECIPE)
    folder = export(made.path, tmp_path / "float", dtype="float32").path
    with_experts_one_by_one(folder)
    theirs, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(told.values())
    model = load_source(resolve(made.path))
    with torch.no_grad():
        found = mx.array(theirs.eval()(torch.tensor([TOKENS])).logits[0].numpy())
        theirs.generation_config.eos_token_id = None
        continued = theirs.generate(torch.tensor([TOKENS]), max_new_tokens=12, do_sample=False)[0].tolist()
    expected = logits(model)
    assert mx.abs(found - expected).max() < 1e-4 * mx.abs(expected).max()
    steps: Iterator[Any] = generate_step(mx.array(TOKENS), model, max_tokens=12)
    assert continued[len(TOKENS) :] == [int(token) for token, _ in steps]


def with_experts_one_by_one(folder: Path) -> None:
    """Rename the experts that an export has in one tensor, as mlx-lm has them, to what transformers reads."""
    file = folder / "model.safetensors"
    tensors = mx.load(str(file))
    for name in [name for name in tensors if ".switch_mlp." in name]:
        for e, weight in enumerate(tensors.pop(name)):
            tensors[name.replace(".switch_mlp.", f".experts.{e}.")] = weight
    mx.save_safetensors(str(file), tensors, {"format": "pt"})


def test_what_is_quantized_and_what_is_not_is_written_down(made: Made) -> None:
    source = resolve(made.converted)
    manifest = Manifest.from_config(source.config)
    assert manifest is not None
    paths = {n.rpartition(".")[0] or n for n, _ in tree_flatten(adapter.build(source.config).parameters())}
    assert paths <= set(manifest.modules) | set(manifest.excluded)
    assert all(manifest.excluded.values())
    experts = [path for path, entry in manifest.modules.items() if len(entry.shape) == 3]
    assert bool(experts) == (made.name in MIXTURES)
    assert not any(path.split(".")[-1] in ("gate", "router", "shared_expert_gate") for path in manifest.modules)


def test_a_mixture_of_experts_in_blocks_that_are_no_power_of_two(tmp_path: Path) -> None:
    made = convert(write_published("gpt_oss", tmp_path / "in"), tmp_path / "out", config=RECIPE)
    manifest = Manifest.from_config(json.loads((made.path / "config.json").read_text()))
    assert manifest is not None
    entry = manifest.modules["model.layers.0.mlp.experts.gate_proj"]
    assert (entry.shape, entry.block) == ((4, 288, 288), 96)
    assert "attention, which gpt-oss keeps" in manifest.excluded["model.layers.0.self_attn.q_proj"]
