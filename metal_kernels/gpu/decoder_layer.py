"""A decoder layer of few positions on a GPU in as few launches as its steps allow, each side of attention one call."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import cast

import mlx.core as mx

from metal_kernels.gpu import turned_product
from metal_kernels.gpu.decode_attention import (
    Codes,
    Heads,
    Packed,
    Plain,
    decode_attention,
    packed_decode_attention,
    state_of,
)
from metal_kernels.gpu.products import FEW_ROWS, Gpu, gated, multiply
from metal_kernels.gpu.tiles import TileWeight
from metal_kernels.gpu.turned_product import Norm
from metal_kernels.launch import made, number

Held = tuple[mx.array, ...]
"""What a layer's cache holds, as `decode_attention` takes it or, packed, `packed_decode_attention`."""

Rope = Callable[[mx.array, mx.array], mx.array]
"""Rotary embedding of heads (B, heads, L, size) from a position on, which is an array."""


@dataclass(frozen=True, eq=False)
class TileLayer:
    """The weights of a pre-norm layer in tiles, as Llama has it: attention, then a gated feed-forward layer.

    qkv stacks queries, keys and values; biases are (out,) or None.
    """

    input_norm: Norm
    feed_forward_norm: Norm
    qkv: TileWeight
    qkv_bias: mx.array | None
    heads: Heads
    rope: Rope
    o: TileWeight
    o_bias: mx.array | None
    gate_up: TileWeight
    down: TileWeight
    gpu: Gpu

    @property
    def dtype(self) -> mx.Dtype:
        """Of the activations that the layer takes."""
        return self.input_norm.weight.dtype

    def before(self, x: mx.array, offset: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """What attention takes of x (B, L, width): queries (B, count, L, size), keys and values (B, kv_count, L, size).

        offset: the first position, an integer in an array.
        """
        count, together = self.heads.count, self.heads.count + self.heads.kv_count
        all_heads = self._stacked(x).reshape(*x.shape[:2], -1, self.heads.size).transpose(0, 2, 1, 3)
        values = all_heads[:, together:]
        if self.heads.norms is None:
            turned = self.rope(all_heads[:, :together], offset)
            return turned[:, :count], turned[:, count:], values
        of_queries, of_keys = self.heads.norms
        queries, keys = of_queries(all_heads[:, :count]), of_keys(all_heads[:, count:together])
        return self.rope(queries, offset), self.rope(keys, offset), values

    def after(self, x: mx.array, attended: mx.array) -> mx.array:
        """The layer's output for its input x (B, L, width) and attention's (B, count, L, size)."""
        attended = attended.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1)
        return self._fed_forward(multiply(attended, self.o, self.gpu, added=x))

    def decode(
        self, x: mx.array, turns: mx.array, cache: Held, state: mx.array, held: mx.array, codes: Codes | None
    ) -> tuple[mx.array, mx.array]:
        """The layer's output (B, width) for one position of each batch entry, and what its cache keeps then.

        state and held as `packed_decode_attention` takes them, codes: of a packed cache.
        """
        stacked = self._stacked(x)
        if codes is None:
            kept = decode_attention(stacked, turns, cast(Plain, cache), state, self.heads)
        else:
            packed = cast(Packed, cache)
            kept = packed_decode_attention(stacked, turns, packed, state, held, self.heads, codes, self.gpu)
        if turned_product.fits(len(x), x.dtype, self.o, self.gpu):
            middle = turned_product.turned_product(kept, self.o, self.gpu, added=x, first=len(x))
        else:
            middle = multiply(self.heads.seen(kept, len(x)), self.o, self.gpu, added=x)
        return self._fed_forward(middle), kept

    def _stacked(self, x: mx.array) -> mx.array:
        return multiply(x, self.qkv, self.gpu, self.input_norm, self.qkv_bias)

    def _fed_forward(self, middle: mx.array) -> mx.array:
        if self.o_bias is not None:
            middle = middle + self.o_bias
        return gated(middle, self.gate_up, self.down, self.gpu, self.feed_forward_norm, middle)


class CompiledLayer:
    """A `TileLayer` with both sides of attention compiled; MLX compiles them again for other numbers of positions."""

    def __init__(self, layer: TileLayer) -> None:
        self.dtype = layer.dtype
        self.before: Callable[[mx.array, mx.array], tuple[mx.array, mx.array, mx.array]] = mx.compile(layer.before)
        self.after: Callable[[mx.array, mx.array], mx.array] = mx.compile(layer.after)

    def takes(self, x: mx.array) -> bool:
        """Whether x (B, L, width) has few enough positions, in the right precision."""
        return x.dtype == self.dtype and x.shape[0] * x.shape[1] <= FEW_ROWS


class CompiledDecoding:
    """All layers of a model for one new token of each batch entry, then its norm, as one call.

    MLX compiles it again where the batch, the room that caches have, or what they are packed by is another.
    """

    def __init__(self, layers: Sequence[TileLayer], norm: Norm) -> None:
        self.dtype, self.heads = norm.weight.dtype, [layer.heads for layer in layers]
        self._layers, self._norm = layers, norm
        self._ropes = {id(layer.rope): layer.rope for layer in layers}
        self._runs: dict[tuple[Codes | None, ...], Callable[..., tuple[mx.array, list[mx.array]]]] = {}

    def __call__(
        self, x: mx.array, offset: int, held: int, waits: int, caches: Sequence[Held], codes: tuple[Codes | None, ...]
    ) -> tuple[mx.array, list[mx.array]]:
        """The normalised output (B, width) for x (B, width) at position `offset`, and what each layer's cache keeps.

        held: tokens that every cache holds; waits: those that wait in it; codes: of each layer's cache.
        """
        if codes not in self._runs:
            self._runs[codes] = mx.compile(partial(self._step, codes))
        return self._runs[codes](x, position(offset), state_of(held, waits), number(held), caches)

    def _step(
        self,
        codes: tuple[Codes | None, ...],
        x: mx.array,
        offset: mx.array,
        state: mx.array,
        held: mx.array,
        caches: Sequence[Held],
    ) -> tuple[mx.array, list[mx.array]]:
        turns = {key: self._turns(rope, offset) for key, rope in self._ropes.items()}
        all_kept = list[mx.array]()
        for layer, own, coded in zip(self._layers, caches, codes, strict=True):
            x, kept = layer.decode(x, turns[id(layer.rope)], own, state, held, coded)
            all_kept.append(kept)
        return self._norm(x), all_kept

    def _turns(self, rope: Rope, offset: mx.array) -> mx.array:
        """Cosines and sines by which a position turns values: what becomes of a head of ones, then zeros."""
        size = self.heads[0].size
        head = made((mx.arange(size) < size // 2).astype(mx.float32))
        return rope(head.reshape(1, 1, 1, size), offset).reshape(size)


@lru_cache(maxsize=4)
def position(value: int) -> mx.array:
    """A position as `CompiledLayer.before` takes it; the layers of a model share the array."""
    return number(value)[0]
