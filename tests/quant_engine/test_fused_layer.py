"""Layers in one step give what mlx-lm's own call gives, with every cache and mask."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import BatchKVCache, KVCache, RotatingKVCache, make_prompt_cache

import metal_kernels
from quant_engine.config import CacheConfig, QuantConfig
from quant_engine.convert import convert
from quant_engine.kv_cache import TurboQuantKVCache
from quant_engine.loader import load_source
from quant_engine.source import resolve
from tests.quant_engine.checkpoints import write_model

KINDS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama with biases": {"model_type": "llama", "attention_bias": True},
    "llama of scaled positions": {
        "model_type": "llama",
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 32},
    },
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 64, "rope_theta": 10000.0},
}  # fmt: skip


def steps(model: nn.Module) -> int:
    """Layers that compute themselves in one step."""
    return sum("_step" in vars(module) for module in model.modules())


def pair(folder: Path, **config: Any) -> tuple[nn.Module, nn.Module]:
    """A model whose layers are fused, and the same of single modules."""
    source = resolve(write_model(folder, **config))
    fused, single = load_source(source), load_source(source, fuse=False)
    assert steps(fused) == len(fused.layers)
    assert steps(single) == 0
    return fused, single


def generated(model: nn.Module, caches: list[Any], batch: int = 1) -> mx.array:
    """Logits of a prompt of 7, then of 3 tokens one by one, then of 2 at once."""
    tokens = mx.random.randint(0, 90, (batch, 12), key=mx.random.key(2))
    parts = [model(tokens[:, a:b], cache=caches) for a, b in ((0, 7), (7, 8), (8, 9), (9, 10), (10, 12))]
    return mx.concatenate(parts, axis=1)


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_single_modules_do(tmp_path: Path, kind: str) -> None:
    fused, single = pair(tmp_path / "in", **KINDS[kind])
    tokens = mx.random.randint(0, 90, (2, 9), key=mx.random.key(2))
    assert mx.allclose(fused(tokens), single(tokens), rtol=1e-4, atol=1e-4)
    one, other = generated(fused, make_prompt_cache(fused)), generated(single, make_prompt_cache(single))
    assert mx.allclose(one, other, rtol=1e-4, atol=1e-4)


CACHES = {
    "plain": KVCache,
    "in a window": lambda: RotatingKVCache(max_size=8, keep=2),
    "compressed": lambda: TurboQuantKVCache(CacheConfig(4, 4, 32)),
    "compressed but for recent tokens": lambda: TurboQuantKVCache(CacheConfig(4, 4, 32, recent_tokens=3)),
    "rows at positions of their own": lambda: BatchKVCache([2, 0]),
}


@pytest.mark.parametrize("cache", CACHES)
def test_every_cache_is_served(tmp_path: Path, cache: str) -> None:
    fused, single = pair(tmp_path / "in")
    batch = 2 if cache.startswith("rows") else 1
    one, other = (generated(m, [CACHES[cache]() for _ in m.layers], batch) for m in (fused, single))
    assert mx.allclose(one, other, rtol=1e-3, atol=1e-3)


def test_converted_layers_are_fused_unless_something_is_added_to_a_product(tmp_path: Path) -> None:
    path = write_model(tmp_path / "in")
    for name, config, fused in (("plain", QuantConfig(bits=3), True), ("qjl", QuantConfig(use_qjl=True), False)):
        source = resolve(convert(path, tmp_path / name, config=config).path)
        model = load_source(source)
        assert steps(model) == (len(model.layers) if fused else 0)
        assert mx.allclose(
            model(mx.array([[1, 2, 3]])), load_source(source, fuse=False)(mx.array([[1, 2, 3]])), atol=1e-3
        )


def test_other_precisions_go_mlx_lms_way_and_the_result_says_what_ran(tmp_path: Path) -> None:
    source = resolve(write_model(tmp_path / "in"))
    for dtype, ran in ((None, True), ("bfloat16", False)):
        model = load_source(source, dtype=dtype)
        metal_kernels.reset_paths()
        mx.eval(model(mx.array([[1, 2]])))
        assert ("decoder_layer" in metal_kernels.kernel_path()) is ran
