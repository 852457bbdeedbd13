"""Attention of one new token over keys and values in full precision, on a GPU, from the product of q, k and v on.

A cache that MLX writes a token into is copied whole while an earlier step may still read it. So the last tokens wait in
a small array of their own, which the kernel hands on with one more; the large arrays are written once in WAITING steps.
"""

import math
from dataclasses import dataclass

import mlx.core as mx

from metal_kernels.gpu.attention import HeadCode, Kind, attend_parts, join_parts
from metal_kernels.gpu.products import Gpu
from metal_kernels.gpu.turned_product import Norm
from metal_kernels.launch import SIMD, Kernel, constant, number, zeros

WAITING = 32
"""Tokens that there is room for apart from the others."""
SIMDGROUPS, JOINING = 8, 8
"""Of a threadgroup that attends to a part of a context, and of one that joins the parts."""
VALUES = 512
"""Of all heads of queries that a threadgroup takes at most: what its registers are enough for."""
ALONE, PART, MOST_PARTS = 512, 256, 528
"""Room for tokens that one threadgroup takes alone, tokens of a part of more at least, and threadgroups at most."""

SOURCES = ("lanes.metal", "softmax.metal", "decode_attention.metal")

_TOKEN = """
  constexpr int CHUNKS = (GROUP + HEADS - 1) / HEADS, THREADS = 32 * SIMDGROUPS;
  THREADGROUP_ARRAY(float, rows, (HEADS + 2) * SIZE);
  THREADGROUP_ARRAY(float, shared, SIMDGROUPS * HEADS * SIZE);
  THREADGROUP_ARRAY(float, maxima, SIMDGROUPS * HEADS);
  THREADGROUP_ARRAY(float, totals, SIMDGROUPS * HEADS);
  THREADGROUP_ARRAY(float, factors, SIMDGROUPS * HEADS);
  uint lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup, index = simdgroup * 32 + lane;
  uint part = threadgroup_position_in_grid.x, parts = threadgroups_per_grid.x;
  uint head = threadgroup_position_in_grid.y / CHUNKS, first = threadgroup_position_in_grid.y % CHUNKS * HEADS;
  uint kv_heads = waiting_shape[2], all_heads = waiting_shape[1] * kv_heads, few = waits[0];
  uint entry = head / kv_heads, kv_head = head % kv_heads, row = head * GROUP + first;
  uint count = GROUP - first < uint(HEADS) ? GROUP - first : HEADS;
  uint query_row = entry * (GROUP + 2) * kv_heads + kv_head * GROUP + first;
  uint key_row = entry * (GROUP + 2) * kv_heads + GROUP * kv_heads + kv_head, value_row = key_row + kv_heads;
  turboquant::NewToken<HEADS, SIZE, SIMDGROUPS, NORMED, T> token{rows};
  token.load(stacked + query_row * SIZE, stacked + key_row * SIZE, stacked + value_row * SIZE, query_norm, key_norm,
             eps[0], count, index);
  token.turn(turns, index);
  turboquant::Seen<HEADS, SIZE> seen(rows, factor[0], lane % 8);
  uint keys_at = head * WAITING * SIZE, values_at = (all_heads + head) * WAITING * SIZE;
  if (part == 0) {
    seen.template walk<SIMDGROUPS, T>(waiting + keys_at, waiting + values_at, 0, few, simdgroup, lane);
    if (first == 0) {
      token.join(waiting + keys_at, waiting + values_at, joined + keys_at, joined + values_at, few, index);
    }
    if (simdgroup == SIMDGROUPS - 1) {
      typename turboquant::Seen<HEADS, SIZE>::Few newest;
      newest.load(rows + HEADS * SIZE, lane < 8, lane % 8);
      seen.add(newest);
    }
  }
"""
_TOGETHER = """
  seen.finish();
  seen.note(maxima + simdgroup * HEADS, totals + simdgroup * HEADS, lane);
  turboquant::join<HEADS, SIMDGROUPS>(maxima, totals, factors, index);
  seen.give(shared + simdgroup * HEADS * SIZE, factors + simdgroup * HEADS, lane);
  turboquant::barrier();
  for (uint i = index; i < count * SIZE; i += THREADS) {
    float sum = 0;
    UNROLL
    for (int s = 0; s < SIMDGROUPS; s++) {
      sum += shared[s * HEADS * SIZE + i];
    }
    if (SINGLE) {
      out[row * SIZE + i] = static_cast<OUT>(sum / totals[i / SIZE]);
    } else {
      out[((row + i / SIZE) * parts + part) * SIZE + i % SIZE] = static_cast<OUT>(sum);
    }
  }
  if (index < count) {
    stats[((row + index) * parts + part) * 2] = maxima[index];
    stats[((row + index) * parts + part) * 2 + 1] = totals[index];
  }
"""
_INPUTS = ("stacked", "turns", "query_norm", "key_norm", "eps", "factor", "waiting", "waits")

ATTEND = Kernel(
    name="turboquant_decode_attention",
    sources=("decode_attention.metal",),
    inputs=(*_INPUTS, "keys", "values", "held", "chunk"),
    outputs=("out", "stats", "joined"),
)

WAITERS = Kernel(
    name="turboquant_decode_attention_waiting",
    sources=("decode_attention.metal",),
    inputs=_INPUTS,
    outputs=("out", "stats", "joined", "queries"),
)

JOIN = Kernel(
    name="turboquant_decode_attention_parts",
    sources=("decode_attention.metal",),
    inputs=("sums", "stats"),
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


def fits(heads: Heads) -> bool:
    """Whether the kernel takes heads of this size."""
    return heads.size % 16 == 0 and heads.size <= 256


Codes = tuple[HeadCode, HeadCode]
"""How keys are packed, and values."""

Plain = tuple[mx.array, mx.array, mx.array]
"""What a layer holds: `waiting` (2, B, kv_count, WAITING, size), then keys and values (B, kv_count, room, size)."""

Packed = tuple[mx.array, mx.array, mx.array, mx.array, mx.array]
"""The same of a compressed cache: `waiting`, then codes and scales of keys, codes and scales of values."""


def decode_attention(
    stacked: mx.array, turns: mx.array, cache: Plain, held: mx.array, waits: mx.array, heads: Heads
) -> tuple[mx.array, mx.array]:
    """Attention of one new token a batch entry: its result (B, count * size), and `waiting` with its key and value.

    stacked (B, (count + 2 kv_count) * size): queries, keys and values as the product gives them, before norms and
    rotary embeddings. turns (size,): cosines and sines, float32, of the position. The cache has `held[0]` tokens, and
    `waits[0]` that wait, fewer than WAITING; all of it has stacked's dtype.
    """
    waiting, keys, values = cache
    batch, _, room, size = keys.shape
    tiles, constants = _tiles(batch, stacked.dtype, heads)
    chunk, parts = _parts(room, tiles)
    rows, dtype, single = batch * heads.count, stacked.dtype, parts == 1
    inputs = [*_inputs(stacked, turns, waiting, waits, heads), keys, values, held, number(chunk)]
    outputs = [
        ((batch, heads.count * size), dtype) if single else ((rows, parts, size), mx.float32),
        ((rows, parts, 2), mx.float32),
        (waiting.shape, dtype),
    ]
    more = {"SINGLE": single, "OUT": dtype if single else mx.float32}
    out, stats, joined = ATTEND.launch(inputs, outputs, (parts, tiles), SIMD * SIMDGROUPS, constants | more)
    if single:
        return out, joined
    constants = {"SIZE": size, "SIMDGROUPS": JOINING, "T": dtype}
    whole = ((batch, heads.count * size), dtype)
    return JOIN.launch([out, stats], [whole], (rows, 1), SIMD * JOINING, constants)[0], joined


def packed_decode_attention(
    stacked: mx.array,
    turns: mx.array,
    cache: Packed,
    held: mx.array,
    waits: mx.array,
    heads: Heads,
    codes: Codes,
    gpu: Gpu,
) -> tuple[mx.array, mx.array]:
    """As `decode_attention`, where keys and values are packed by these codes but for those that wait; `held` > 0."""
    waiting, key_codes, key_scales, value_codes, value_scales = cache
    batch, dtype, rows = waiting.shape[1], stacked.dtype, waiting.shape[1] * heads.count
    tiles, constants = _tiles(batch, dtype, heads)
    outputs = [
        ((rows, 1, heads.size), mx.float32), ((rows, 1, 2), mx.float32), (waiting.shape, dtype),
        ((batch, heads.count, 1, heads.size), dtype),
    ]  # fmt: skip
    inputs, more = _inputs(stacked, turns, waiting, waits, heads), {"SINGLE": False, "OUT": mx.float32}
    sums, stats, joined, queries = WAITERS.launch(inputs, outputs, (1, tiles), SIMD * SIMDGROUPS, constants | more)
    kind = Kind(*codes, heads.scale, causal=False, gpu=gpu)
    parts = attend_parts(kind, queries, key_codes, key_scales, value_codes, value_scales, held, None)
    seen = join_parts(codes[1], parts, queries.shape, dtype, newest=(sums, stats))
    return seen.reshape(batch, heads.count * heads.size), joined


def _tiles(batch: int, dtype: mx.Dtype, heads: Heads) -> tuple[int, dict[str, int | bool | mx.Dtype]]:
    """Threadgroups that a part of the context takes, and compile-time values."""
    group = heads.count // heads.kv_count
    chunks = -(-group * heads.size // VALUES)
    at_once = -(-group // chunks)
    return batch * heads.kv_count * -(-group // at_once), {
        "HEADS": at_once, "GROUP": group, "SIZE": heads.size, "SIMDGROUPS": SIMDGROUPS, "WAITING": WAITING,
        "NORMED": heads.norms is not None, "T": dtype,
    }  # fmt: skip


def _inputs(stacked: mx.array, turns: mx.array, waiting: mx.array, waits: mx.array, heads: Heads) -> list[mx.array]:
    norms = heads.norms or (Norm(zeros(stacked.dtype), 0.0),) * 2
    factor = constant(heads.scale * math.log2(math.e))
    return [stacked, turns, norms[0].weight, norms[1].weight, constant(norms[0].eps), factor, waiting, waits]


def _parts(room: int, tiles: int) -> tuple[int, int]:
    """Tokens of a part of a context of `room`, a multiple of PART, and how many parts there are."""
    if room <= ALONE:
        return ALONE, 1
    chunk = -(-room // max(1, MOST_PARTS // tiles))
    chunk = -(-chunk // PART) * PART
    return chunk, -(-room // chunk)
