"""All layers of a model in one call where a GPU decodes one token at a time."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from metal_kernels import CompiledDecoding, Norm, TileLayer, decode_attention_fits, has_kernel
from quant_engine.gpu_step import GpuStep
from quant_engine.kv_cache import TurboQuantKVCache
from quant_engine.mlx_lm_adapter import PLAIN_MODELS, backbone
from quant_engine.rotary import Rotary, shared
from quant_engine.waiting_cache import can_be_lent, lend, same_length

MOST_ENTRIES = 8
"""Of a batch: those that the kernels of one launch take."""

_OPERATIONS = ("decode_attention", "decoder_layer", "feed_forward")


class ModelStep:
    """The layers of a model and its norm, for one new token of each batch entry, over plain or compressed caches."""

    def __init__(self, layers: Sequence[TileLayer], norm: Norm) -> None:
        self._run = CompiledDecoding(layers, norm)

    def takes(self, x: mx.array, caches: Sequence[Any] | None) -> bool:
        """Whether x is (B, 1, width), and every cache holds some tokens already, equally many."""
        batch, dtype, all_heads = x.shape[0], self._run.dtype, self._run.heads
        if caches is None or len(caches) != len(all_heads):
            return False
        if x.shape[1] != 1 or batch > MOST_ENTRIES or x.dtype != dtype:
            return False
        fit = all(can_be_lent(cache, heads, batch, dtype) for cache, heads in zip(caches, all_heads, strict=True))
        return fit and same_length(caches) and all(map(has_kernel, self._operations(caches)))

    def __call__(self, x: mx.array, caches: Sequence[Any]) -> mx.array:
        """The model's output (B, 1, width), normalised, for x (B, 1, width); the caches have a token more then."""
        lent = [lend(cache, heads, self._run.dtype) for cache, heads in zip(caches, self._run.heads, strict=True)]
        first, arrays, codes = lent[0], [cache.arrays for cache in lent], tuple(cache.codes for cache in lent)
        y, all_kept = self._run(x[:, 0], first.offset, first.held, first.waits, arrays, codes)
        for cache, kept in zip(lent, all_kept, strict=True):
            cache.join(kept)
        return y[:, None]

    def _operations(self, caches: Sequence[Any]) -> tuple[str, ...]:
        packed = any(isinstance(cache, TurboQuantKVCache) for cache in caches)
        return (*_OPERATIONS, "packed_attention") if packed else _OPERATIONS


def fuse_model(model: nn.Module) -> bool:
    """Let a model whose layers are all fused decode in one call; returns whether it does.

    It keeps its own call where the kernels do not take its heads, its norm does more than that, or its rotary
    embeddings are others than those that turn value i of a head with value i + size / 2.
    """
    inner = backbone(model)
    if type(inner) not in PLAIN_MODELS or getattr(inner, "pipeline_size", 1) > 1:
        return False
    if type(cast(Any, inner).norm) is not nn.RMSNorm:
        return False
    module, layers, rotaries = cast(Any, inner), list[TileLayer](), list[Rotary]()
    for block in module.layers:
        step = getattr(block, "_step", None)
        if not isinstance(step, GpuStep) or getattr(block, "use_sliding", False):
            return False
        rotary = Rotary.of(step.layer.rope, step.layer.heads.size)
        if rotary is None or not decode_attention_fits(step.layer.heads):
            return False
        layers.append(replace(step.layer, rope=shared(rotary, rotaries).rope))
    module._step = ModelStep(layers, Norm(module.norm.weight, module.norm.eps))
    module.__class__ = _stepping(cast(type[nn.Module], type(module)))
    return True


def _stepping(kind: type[nn.Module]) -> type[nn.Module]:
    """A kind of model whose call is its step's, where that takes it."""

    def call(self: Any, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None) -> mx.array:
        x = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        takes = self._step.takes(x, cache)
        return cast(mx.array, self._step(x, cache) if takes else kind.__call__(self, inputs, cache, x))

    return type(kind.__name__, (kind,), {"__call__": call})
