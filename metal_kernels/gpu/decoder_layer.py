"""A decoder layer of few positions on a GPU in as few launches as its steps allow, each side of attention one call."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx

from metal_kernels.gpu.products import FEW_ROWS, Gpu, gated, multiply
from metal_kernels.gpu.tiles import TileWeight
from metal_kernels.gpu.turned_product import Norm
from metal_kernels.launch import number

Rope = Callable[[mx.array, mx.array], mx.array]
"""Rotary embedding of heads (B, heads, L, size) from a position on, which is an array."""


@dataclass(frozen=True, eq=False)
class TileLayer:
    """The weights of a pre-norm layer in tiles, as Llama has it: attention, then a gated feed-forward layer.

    qkv stacks queries, keys and values; biases are (out,) or None; head_norms are those of queries and keys.
    """

    input_norm: Norm
    feed_forward_norm: Norm
    qkv: TileWeight
    qkv_bias: mx.array | None
    head_norms: tuple[Norm, Norm] | None
    rope: Rope
    o: TileWeight
    o_bias: mx.array | None
    gate_up: TileWeight
    down: TileWeight
    heads: int
    kv_heads: int
    gpu: Gpu

    @property
    def dtype(self) -> mx.Dtype:
        """Of the activations that the layer takes."""
        return self.input_norm.weight.dtype

    def before(self, x: mx.array, offset: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """What attention takes of x (B, L, width): queries (B, heads, L, size), keys and values (B, kv_heads, L, size).

        offset: the first position, an integer in an array.
        """
        together = self.heads + self.kv_heads
        stacked = multiply(x, self.qkv, self.gpu, self.input_norm, self.qkv_bias)
        all_heads = stacked.reshape(*x.shape[:2], together + self.kv_heads, -1).transpose(0, 2, 1, 3)
        values = all_heads[:, together:]
        if self.head_norms is None:
            turned = self.rope(all_heads[:, :together], offset)
            return turned[:, : self.heads], turned[:, self.heads :], values
        of_queries, of_keys = self.head_norms
        queries, keys = of_queries(all_heads[:, : self.heads]), of_keys(all_heads[:, self.heads : together])
        return self.rope(queries, offset), self.rope(keys, offset), values

    def after(self, x: mx.array, attended: mx.array) -> mx.array:
        """The layer's output for its input x (B, L, width) and attention's (B, heads, L, size)."""
        mixed = attended.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1)
        middle = multiply(mixed, self.o, self.gpu, added=x)
        if self.o_bias is not None:
            middle = middle + self.o_bias
        return gated(middle, self.gate_up, self.down, self.gpu, self.feed_forward_norm, middle)


class CompiledLayer:
    """A `TileLayer` with both sides of attention compiled; MLX compiles them again for other numbers of positions.

    through(x, attended, offset), once the layer is followed: its output and what the next one's attention takes of it.
    """

    def __init__(self, layer: TileLayer) -> None:
        self.dtype, self._layer = layer.dtype, layer
        self.before: Callable[[mx.array, mx.array], tuple[mx.array, mx.array, mx.array]] = mx.compile(layer.before)
        self.after: Callable[[mx.array, mx.array], mx.array] = mx.compile(layer.after)
        self.through: Callable[[mx.array, mx.array, mx.array], tuple[mx.array, ...]]

    def follow_with(self, following: "CompiledLayer") -> None:
        """Let `following` be the layer that `through` begins."""

        def through(x: mx.array, attended: mx.array, offset: mx.array) -> tuple[mx.array, ...]:
            y = self._layer.after(x, attended)
            return y, *following._layer.before(y, offset)

        self.through = mx.compile(through)

    def takes(self, x: mx.array) -> bool:
        """Whether x (B, L, width) has few enough positions, in the right precision."""
        return x.dtype == self.dtype and x.shape[0] * x.shape[1] <= FEW_ROWS


@lru_cache(maxsize=4)
def position(value: int) -> mx.array:
    """A position as `CompiledLayer.before` takes it; the layers of a model share the array."""
    return number(value)[0]
