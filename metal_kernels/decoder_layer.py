"""A whole decoder layer in one step on a CPU, where every array that MLX evaluates costs more than most arithmetic."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from metal_kernels.cpu.arrays import rows_float32
from metal_kernels.cpu.heads import HeadNorms, split_heads
from metal_kernels.cpu.norm import rms_rows
from metal_kernels.dispatch import record
from metal_kernels.feed_forward import feed_forward_rows
from metal_kernels.matmul import Weight

Array = NDArray[np.float32]
Turns = tuple[Array, Array]
"""Cosines and sines (positions, head size / 2) of rotary embeddings."""


@dataclass(frozen=True)
class DecoderLayer:
    """The weights of a pre-norm layer: attention over shared inputs, then a gated feed-forward layer, as Llama has it.

    norms (width,) and `eps`; qkv stacks queries, keys and values; o (width, heads * size); biases are
    (out,) or None.
    """

    input_norm: Array
    feed_forward_norm: Array
    eps: float
    qkv: Weight
    qkv_bias: Array | None
    head_norms: HeadNorms | None
    o: Weight
    o_bias: Array | None
    gate_up: Weight
    down: Weight
    heads: int
    kv_heads: int


Attend = Callable[[Array, Array, Array], Array]
"""Attention of queries (B, heads, L, size) with new keys and values (B, kv_heads, L, size): (B, heads, L, size)."""


def decoder_layer(x: mx.array, layer: DecoderLayer, turns: Turns, attend: Attend) -> mx.array:
    """The layer's output (B, L, width) for float32 x (B, L, width), evaluated; only on a CPU.

    turns: of the L positions; attend: attention, over what a cache holds besides.
    """
    rows = rows_float32(x)
    stacked = layer.qkv.product(layer.qkv.prepare(rms_rows(rows, layer.input_norm, np.float32(layer.eps))))
    if layer.qkv_bias is not None:
        stacked += layer.qkv_bias
    seen = attend(*split_heads(stacked, x.shape[0], layer.heads, layer.kv_heads, *turns, layer.head_norms))
    mixed = np.ascontiguousarray(seen.transpose(0, 2, 1, 3)).reshape(len(rows), -1)
    after = rows + layer.o.product(layer.o.prepare(mixed))
    if layer.o_bias is not None:
        after += layer.o_bias
    normed = rms_rows(after, layer.feed_forward_norm, np.float32(layer.eps))
    after += feed_forward_rows(normed, layer.gate_up, layer.down)
    for operation in (layer.qkv.operation, layer.o.operation, layer.gate_up.operation):
        record("cpu", operation)
    return mx.array(after.reshape(x.shape))
