"""Decoder layers that compute themselves in fewer steps, in the place of mlx-lm's own call."""

from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache

from metal_kernels import (
    DecoderLayer,
    Gpu,
    HeadNorms,
    Heads,
    Mask,
    Norm,
    TileLayer,
    active_backend,
    attention_rows,
    decoder_layer,
    device,
    has_kernel,
    tiles_of,
    writable,
)
from quant_engine.fast_layers import FeedForward
from quant_engine.gpu_step import GpuStep
from quant_engine.kv_cache import TurboQuantKVCache
from quant_engine.linear import FastLinear, TurboQuantLinear
from quant_engine.mlx_lm_adapter import PLAIN_LAYERS, attention_of_new
from quant_engine.rotary import Rotary, shared
from quant_engine.shared_input import Branch
from quant_engine.token_store import Array, append


class _CpuStep:
    """A layer in one step in float32: its weights, its rotary embeddings, and the scale of its scores."""

    def __init__(self, layer: DecoderLayer, rotary: Rotary, scale: float) -> None:
        self._layer, self._rotary, self._scale = layer, rotary, scale

    def takes(self, x: mx.array) -> bool:
        return x.dtype == mx.float32 and active_backend() == "cpu" and has_kernel("decoder_layer")

    def __call__(self, x: mx.array, mask: Mask, cache: Any) -> mx.array:
        def attend(q: Array, k: Array, v: Array) -> Array:
            return self._attend(q, k, v, mask, cache)

        turns = self._rotary.turns(0 if cache is None else int(cache.offset), x.shape[1])
        return decoder_layer(x, self._layer, turns, attend)

    def _attend(self, q: Array, k: Array, v: Array, mask: Mask, cache: Any) -> Array:
        if cache is None or type(cache) is KVCache:
            keys, values, length = (k, v, k.shape[2]) if cache is None else append(cache, k, v)
            return attention_rows(q, keys, values, length=length, scale=self._scale, mask=mask)
        if type(cache) is TurboQuantKVCache:
            seen = cache.attend_rows(q, k, v, scale=self._scale, mask=mask)
            if seen is not None:
                return seen
        return writable(attention_of_new(mx.array(q), mx.array(k), mx.array(v), cache, self._scale, mask))


def fuse_decoder_layers(model: nn.Module) -> int:
    """Let layers of the known kinds compute themselves in fewer steps; returns how many do.

    Those stay as they are whose projections are not stacked, have what the step lacks, or whose rotary embeddings turn
    values otherwise. Their modules and parameters are left in place.
    """
    fused, rotaries = 0, list[Rotary]()
    for module in cast(list[nn.Module], model.modules()):
        if type(module) in PLAIN_LAYERS and (step := _fused(module, rotaries)) is not None:
            module.__class__ = _stepping(type(module))
            module._step = step
            fused += 1
    return fused


def _stepping(kind: type[nn.Module]) -> type[nn.Module]:
    """A kind of layer whose call is its step's, but for inputs it does not take and rows at different positions."""

    def call(self: Any, x: mx.array, mask: Mask = None, cache: Any = None) -> mx.array:
        own = isinstance(getattr(cache, "offset", 0), int) and self._step.takes(x)
        return cast(mx.array, self._step(x, mask, cache) if own else kind.__call__(self, x, mask, cache))

    return type(kind.__name__, (kind,), {"__call__": call})


def _fused(block: Any, rotaries: list[Rotary]) -> _CpuStep | GpuStep | None:
    own = block.self_attn
    branch, out, feed_forward = own.q_proj, own.o_proj, block.mlp
    stacked = branch.stacked if isinstance(branch, Branch) else None
    if not (isinstance(stacked, FastLinear) and isinstance(out, FastLinear) and isinstance(feed_forward, FeedForward)):
        return None
    if isinstance(out, TurboQuantLinear) and out.corrected:
        return None
    gpu = device()
    if gpu == "cpu":
        return _cpu_step(block, stacked, out, feed_forward, rotaries)
    return _gpu_step(block, stacked, out, feed_forward, gpu)


def _cpu_step(
    block: Any, stacked: FastLinear, out: FastLinear, feed_forward: FeedForward, rotaries: list[Rotary]
) -> _CpuStep | None:
    own, norms = block.self_attn, (block.input_layernorm, block.post_attention_layernorm)
    rotary = Rotary.of(own.rope, stacked.shape[0] // (own.n_heads + 2 * own.n_kv_heads))
    if rotary is None or norms[0].eps != norms[1].eps:
        return None
    rotary = shared(rotary, rotaries)
    heads = HeadNorms(_array(own.q_norm.weight), _array(own.k_norm.weight), own.q_norm.eps) if "q_norm" in own else None
    layer = DecoderLayer(
        _array(norms[0].weight), _array(norms[1].weight), norms[0].eps, stacked.matrix,
        _array(stacked.bias) if "bias" in stacked else None, heads, out.matrix,
        _array(out.bias) if "bias" in out else None, *feed_forward.weights, own.n_heads, own.n_kv_heads,
    )  # fmt: skip
    return _CpuStep(layer, rotary, own.scale)


def _gpu_step(block: Any, stacked: FastLinear, out: FastLinear, feed_forward: FeedForward, gpu: Gpu) -> GpuStep | None:
    own = block.self_attn
    qkv, o, gate_up, down = (tiles_of(weight) for weight in (stacked.matrix, out.matrix, *feed_forward.weights))
    if qkv is None or o is None or gate_up is None or down is None:
        return None
    input_norm, norm = _norm(block.input_layernorm), _norm(block.post_attention_layernorm)
    dtype = norm.weight.dtype
    of_heads = (_norm(own.q_norm), _norm(own.k_norm)) if "q_norm" in own else None
    size = qkv.rows // (own.n_heads + 2 * own.n_kv_heads)
    heads = Heads(own.n_heads, own.n_kv_heads, size, own.scale, of_heads)
    layer = TileLayer(
        input_norm, norm, qkv, _bias(stacked, dtype), heads, own.rope, o, _bias(out, dtype), gate_up, down, gpu
    )
    return GpuStep(layer)


def _norm(norm: Any) -> Norm:
    return Norm(norm.weight, norm.eps)


def _bias(layer: FastLinear, dtype: mx.Dtype) -> mx.array | None:
    return layer.bias.astype(dtype) if "bias" in layer else None


def _array(x: mx.array) -> Array:
    return writable(x.astype(mx.float32)).copy()
