"""A whole converted model on this machine's GPU, where it has one, against the same on the CPU."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import metal_kernels
from quant_engine.config import CacheConfig, QuantConfig
from quant_engine.convert import convert
from quant_engine.generate import make_cache
from quant_engine.loader import load
from quant_engine.prompt import prompt_tokens

PROMPT = "The city lies on the river and has been the seat of a bishop since the middle of the century."
DECODED = 12
"""Tokens that come one at a time, after the prompt's others."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Path:
    out = tmp_path_factory.mktemp("model") / "out"
    convert(demo_model, out, config=QuantConfig(bits=4))
    return out


def logits(folder: Path, cache: CacheConfig | None, dtype: str = "float16") -> mx.array:
    """Of the tokens of PROMPT that come one at a time, float32, by a model of activations of `dtype`."""
    loaded: tuple[Any, Any] = load(folder, dtype=dtype)
    model, tokenizer = loaded
    tokens = mx.array(prompt_tokens(tokenizer, PROMPT, chat=False))
    held, made = make_cache(model, cache), list[mx.array]()
    model(tokens[None, :-DECODED], cache=held)
    for i in range(len(tokens) - DECODED, len(tokens)):
        made.append(model(tokens[None, i : i + 1], cache=held)[0, -1])
    found = mx.stack(made).astype(mx.float32)
    mx.eval(found)
    return found


@pytest.mark.skipif(not mx.is_available(mx.Device(mx.gpu)), reason="MLX has no GPU here")
@pytest.mark.parametrize("cache", [None, CacheConfig(k_bits=8, v_bits=4)], ids=["plain cache", "compressed cache"])
def test_a_model_on_the_gpu_is_as_near_to_float32_as_in_plain_mlx(folder: Path, cache: CacheConfig | None) -> None:
    with metal_kernels.use_backend("reference"):
        right, plain = (logits(folder, cache, dtype) for dtype in ("float32", "float16"))
    metal_kernels.reset_paths()
    with mx.stream(mx.gpu):
        found, gpu = logits(folder, cache), metal_kernels.device()
    assert mx.abs(found - right).max() < 3 * mx.abs(plain - right).max()
    by_kernels = next(path for path in metal_kernels.kernel_path().split("; ") if path.startswith(f"{gpu}:"))
    assert "decode_attention" in by_kernels
    assert ("packed_attention" in by_kernels) == (cache is not None)
