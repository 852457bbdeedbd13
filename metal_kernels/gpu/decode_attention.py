"""Attention of one new token over keys and values on a GPU, from the product of q, k and v on.

A cache that MLX writes a token into is copied whole while an earlier step may still read it. So the last tokens wait in
a small array of their own, which the kernel hands on with one more; the large arrays are written once in WAITING steps.
That array begins with the result, since MLX takes time for every array of a launch.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx

from metal_kernels.gpu.attention import HeadCode, Kind, attend_parts, parts_of
from metal_kernels.gpu.products import Gpu
from metal_kernels.gpu.turned_product import Norm
from metal_kernels.launch import SIMD, Kernel, float_bits, made, number, zeros

WAITING = 32
"""Tokens that there is room for apart from the others."""
SIMDGROUPS = 8
"""Of a threadgroup."""
VALUES = 512
"""Of all heads of queries that a threadgroup takes at most: what its registers are enough for."""
THREADGROUPS = 528
"""Four for each of an H100's multiprocessors, which parts of a context keep busy."""
ALONE, PART = 512, 256
"""Room for tokens that one threadgroup takes alone, and tokens of a part of more, or a multiple."""

_INPUTS = ("stacked", "turns", "norms", "kept", "state")

ALL = Kernel(
    name="turboquant_decode_attention",
    sources=("decode_attention.metal",),
    inputs=(*_INPUTS, "keys", "values"),
    outputs=("out",),
)

SPLIT = Kernel(
    name="turboquant_decode_attention_split",
    sources=("decode_attention.metal",),
    inputs=(*_INPUTS, "keys", "values"),
    outputs=("out",),
)

WAITERS = Kernel(
    name="turboquant_decode_attention_waiting",
    sources=("decode_attention.metal",),
    inputs=_INPUTS,
    outputs=("out",),
)

JOIN = Kernel(
    name="turboquant_decode_attention_parts",
    sources=("decode_attention.metal",),
    inputs=("parts", "newest", "kept", "state", "fixed"),
    outputs=("out",),
)


@dataclass(frozen=True, eq=False)
class Heads:
    """What attention is told of a layer's heads; norms are those of queries and keys, scale that of scores."""

    count: int
    kv_count: int
    size: int
    scale: float
    norms: tuple[Norm, Norm] | None

    @cached_property
    def norm_weights(self) -> mx.array | None:
        """The norms' weights (2, size), if there are any."""
        return None if self.norms is None else made(mx.stack([norm.weight for norm in self.norms]))

    def room(self, batch: int, dtype: mx.Dtype) -> mx.array:
        """`kept` while no token waits."""
        return mx.zeros((batch * (self.count + 2 * self.kv_count * WAITING) * self.size,), dtype)

    def seen(self, kept: mx.array, batch: int) -> mx.array:
        """The result (batch, count * size) that `kept` begins with."""
        return kept[: batch * self.count * self.size].reshape(batch, self.count * self.size)

    def waiting(self, kept: mx.array, batch: int) -> mx.array:
        """Keys and values (2, batch, kv_count, WAITING, size) of tokens that wait."""
        return kept[batch * self.count * self.size :].reshape(2, batch, self.kv_count, WAITING, self.size)


def fits(heads: Heads) -> bool:
    """Whether the kernel takes heads of this size."""
    return heads.size % 16 == 0 and heads.size <= 256


def state_of(held: int, waits: int) -> mx.array:
    """What the kernels are told of how many tokens a cache holds, and how many, fewer than WAITING, wait."""
    return number(held * WAITING + waits)


Codes = tuple[HeadCode, HeadCode]
"""How keys are packed, and values."""

Plain = tuple[mx.array, mx.array, mx.array]
"""What a layer holds: `kept`, see `Heads`, then keys and values (B, kv_count, room, size)."""

Packed = tuple[mx.array, mx.array, mx.array, mx.array, mx.array]
"""The same of a compressed cache: `kept`, then codes and scales of keys, codes and scales of values."""


def decode_attention(stacked: mx.array, turns: mx.array, cache: Plain, state: mx.array, heads: Heads) -> mx.array:
    """Attention of one new token a batch entry: `kept` with its result, its key and value among those that wait.

    stacked (B, (count + 2 kv_count) * size): queries, keys and values as the product gives them, before norms and
    rotary embeddings. turns (size,): cosines and sines, float32, of the position. state: see `state_of`. The cache has
    stacked's dtype.
    """
    kept, keys, values = cache
    batch, _, room, size = keys.shape
    tiles, constants = _tiles(batch, stacked.dtype, heads)
    parts = 1 if room <= ALONE else parts_of(room, THREADGROUPS // tiles, PART)
    inputs, threads = [*_inputs(stacked, turns, kept, state, heads), keys, values], SIMD * SIMDGROUPS
    if parts == 1:
        return ALL.launch(inputs, [(kept.shape, kept.dtype)], (1, tiles), threads, constants)[0]
    rows = batch * heads.count
    out = (rows * parts * (size + 2) + 2 * batch * heads.kv_count * size,), mx.float32
    found = SPLIT.launch(inputs, [out], (parts, tiles), threads, constants | {"PART": PART})[0]
    return _joined(found, found, kept, state, heads, batch, None)


def packed_decode_attention(
    stacked: mx.array,
    turns: mx.array,
    cache: Packed,
    state: mx.array,
    held: mx.array,
    heads: Heads,
    codes: Codes,
    gpu: Gpu,
) -> mx.array:
    """As `decode_attention`, where keys and values are packed by these codes but for those that wait.

    held: how many are packed, not 0, in an array.
    """
    kept, key_codes, key_scales, value_codes, value_scales = cache
    batch, rows = key_codes.shape[0], key_codes.shape[0] * heads.count
    tiles, constants = _tiles(batch, stacked.dtype, heads)
    sums, queries, new = rows * (heads.size + 2), rows * heads.size, 2 * batch * heads.kv_count * heads.size
    inputs, out = _inputs(stacked, turns, kept, state, heads), ((sums + queries + new,), mx.float32)
    newest = WAITERS.launch(inputs, [out], (1, tiles), SIMD * SIMDGROUPS, constants)[0]
    q = newest[sums : sums + queries].reshape(batch, heads.count, 1, heads.size)
    kind = Kind(*codes, heads.scale, causal=False, gpu=gpu)
    parts = attend_parts(kind, q, (key_codes, key_scales), (value_codes, value_scales), held, None)
    return _joined(parts, newest, kept, state, heads, batch, codes[1])


def _joined(
    parts: mx.array, newest: mx.array, kept: mx.array, state: mx.array, heads: Heads, batch: int, code: HeadCode | None
) -> mx.array:
    """`kept` with the sum of parts, and with the newest token's key and value."""
    constants = {
        "GROUP": heads.count // heads.kv_count, "KV_HEADS": heads.kv_count, "SIZE": heads.size,
        "SIMDGROUPS": SIMDGROUPS, "WAITING": WAITING, "PACKED": code is not None, "ODD": code.odd if code else 1,
        "POWER": code.power if code else SIMD, "T": kept.dtype,
    }  # fmt: skip
    groups = batch * (heads.count + 2 * heads.kv_count), 1
    inputs = [parts, newest, kept, state, code.fixed if code else zeros(mx.uint32)]
    return JOIN.launch(inputs, [(kept.shape, kept.dtype)], groups, SIMD * SIMDGROUPS, constants)[0]


def _tiles(batch: int, dtype: mx.Dtype, heads: Heads) -> tuple[int, dict[str, int | bool | mx.Dtype]]:
    """Threadgroups that a part of the context takes, and compile-time values."""
    group, eps = heads.count // heads.kv_count, heads.norms[0].eps if heads.norms else 0.0
    chunks = -(-group // max(1, VALUES // heads.size))
    at_once = -(-group // chunks)
    return batch * heads.kv_count * chunks, {
        "HEADS": at_once, "GROUP": group, "KV_HEADS": heads.kv_count, "SIZE": heads.size, "SIMDGROUPS": SIMDGROUPS,
        "WAITING": WAITING, "NORMED": heads.norms is not None, "EPS": float_bits(eps),
        "FACTOR": float_bits(heads.scale * math.log2(math.e)), "T": dtype,
    }  # fmt: skip


def _inputs(stacked: mx.array, turns: mx.array, kept: mx.array, state: mx.array, heads: Heads) -> list[mx.array]:
    norms = heads.norm_weights
    return [stacked, turns, zeros(stacked.dtype) if norms is None else norms, kept, state]
