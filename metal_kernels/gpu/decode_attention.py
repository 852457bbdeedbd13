"""Attention of one new token over keys and values in full precision, on a GPU, from the product of q, k and v on.

A cache that MLX writes a token into is copied whole while an earlier step may still read it. So the last tokens wait in
a small array of their own, which the kernel hands on with one more; the large arrays are written once in WAITING steps.
"""

import math
from dataclasses import dataclass

import mlx.core as mx

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

ATTEND = Kernel(
    name="turboquant_decode_attention",
    sources=SOURCES,
    inputs=("stacked", "turns", "query_norm", "key_norm", "eps", "waiting", "keys", "values", "held", "waits", "factor",
            "chunk"),
    outputs=("out", "stats", "joined"),
    body="""
  constexpr int CHUNKS = (GROUP + HEADS - 1) / HEADS, THREADS = 32 * SIMDGROUPS;
  THREADGROUP_ARRAY(float, rows, (HEADS + 2) * SIZE);
  THREADGROUP_ARRAY(float, shared, SIMDGROUPS * HEADS * SIZE);
  THREADGROUP_ARRAY(float, maxima, SIMDGROUPS * HEADS);
  THREADGROUP_ARRAY(float, totals, SIMDGROUPS * HEADS);
  THREADGROUP_ARRAY(float, factors, SIMDGROUPS * HEADS);
  uint lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup, index = simdgroup * 32 + lane;
  uint part = threadgroup_position_in_grid.x, parts = threadgroups_per_grid.x;
  uint head = threadgroup_position_in_grid.y / CHUNKS, first = threadgroup_position_in_grid.y % CHUNKS * HEADS;
  uint kv_heads = keys_shape[1], all_heads = keys_shape[0] * kv_heads, room = keys_shape[2];
  uint entry = head / kv_heads, kv_head = head % kv_heads, count = GROUP - first < uint(HEADS) ? GROUP - first : HEADS;
  uint query_row = entry * (GROUP + 2) * kv_heads + kv_head * GROUP + first, old = held[0], few = waits[0];
  uint key_row = entry * (GROUP + 2) * kv_heads + GROUP * kv_heads + kv_head, value_row = key_row + kv_heads;
  turboquant::NewToken<HEADS, SIZE, SIMDGROUPS, NORMED, T> token{rows};
  token.load(stacked + query_row * SIZE, stacked + key_row * SIZE, stacked + value_row * SIZE, query_norm, key_norm,
             eps[0], count, index);
  token.turn(turns, factor[0], index);
  turboquant::Seen<HEADS, SIZE> seen(rows, lane % 8);
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
  uint start = part * chunk[0], end = start + chunk[0] < old ? start + chunk[0] : old;
  uint begin = head * room * SIZE;
  seen.template walk<SIMDGROUPS, T>(keys + begin, values + begin, start, end, simdgroup, lane);
  seen.finish();
  seen.note(maxima + simdgroup * HEADS, totals + simdgroup * HEADS, lane);
  turboquant::join<HEADS, SIMDGROUPS>(maxima, totals, factors, index);
  seen.give(shared + simdgroup * HEADS * SIZE, factors + simdgroup * HEADS, lane);
  turboquant::barrier();
  uint row = head * GROUP + first;
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
""",
)  # fmt: skip

JOIN = Kernel(
    name="turboquant_decode_attention_parts",
    sources=SOURCES,
    inputs=("sums", "stats"),
    outputs=("out",),
    body="""
  THREADGROUP_ARRAY(float, shared, SIMDGROUPS * SIZE);
  uint row = threadgroup_position_in_grid.x, parts = sums_shape[1], index = thread_index_in_threadgroup;
  turboquant::add_parts<SIZE, SIMDGROUPS>(
      sums + row * parts * SIZE, stats + row * parts * 2, turboquant::NOTHING, shared, parts, index);
  for (uint column = index; column < uint(SIZE); column += 32 * SIMDGROUPS) {
    out[row * SIZE + column] = static_cast<T>(shared[column]);
  }
""",
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


def decode_attention(
    stacked: mx.array,
    turns: mx.array,
    waiting: mx.array,
    keys: mx.array,
    values: mx.array,
    held: mx.array,
    waits: mx.array,
    heads: Heads,
) -> tuple[mx.array, mx.array]:
    """Attention of one new token a batch entry: its result (B, count * size), and `waiting` with its key and value.

    stacked (B, (count + 2 kv_count) * size): queries, keys and values as the product gives them, before norms and
    rotary embeddings. turns (size,): cosines and sines, float32, of the position. keys, values (B, kv_count, room,
    size) and waiting (2, B, kv_count, WAITING, size): of the tokens before, the first `held[0]` and the next
    `waits[0]`, fewer than WAITING. All have stacked's dtype.
    """
    batch, kv_heads, room, size = keys.shape
    group = heads.count // heads.kv_count
    chunks = -(-group * size // VALUES)
    at_once = -(-group // chunks)
    tiles = batch * kv_heads * -(-group // at_once)
    chunk, parts = _parts(room, tiles)
    norms = heads.norms or (Norm(zeros(stacked.dtype), 0.0),) * 2
    inputs = [
        stacked, turns, norms[0].weight, norms[1].weight, constant(norms[0].eps), waiting, keys, values, held, waits,
        constant(heads.scale * math.log2(math.e)), number(chunk),
    ]  # fmt: skip
    rows, dtype, single = batch * heads.count, stacked.dtype, parts == 1
    constants = {
        "HEADS": at_once, "GROUP": group, "SIZE": size, "SIMDGROUPS": SIMDGROUPS, "WAITING": WAITING, "SINGLE": single,
        "NORMED": heads.norms is not None, "T": dtype, "OUT": dtype if single else mx.float32,
    }  # fmt: skip
    outputs = [
        ((batch, heads.count * size), dtype) if single else ((rows, parts, size), mx.float32),
        ((rows, parts, 2), mx.float32),
        (waiting.shape, dtype),
    ]
    out, stats, joined = ATTEND.launch(inputs, outputs, (parts, tiles), SIMD * SIMDGROUPS, constants)
    if single:
        return out, joined
    constants = {"SIZE": size, "SIMDGROUPS": JOINING, "T": dtype}
    whole = ((batch, heads.count * size), dtype)
    return JOIN.launch([out, stats], [whole], (rows, 1), SIMD * JOINING, constants)[0], joined


def _parts(room: int, tiles: int) -> tuple[int, int]:
    """Tokens of a part of a context of `room`, a multiple of PART, and how many parts there are."""
    if room <= ALONE:
        return ALONE, 1
    chunk = -(-room // max(1, MOST_PARTS // tiles))
    chunk = -(-chunk // PART) * PART
    return chunk, -(-room // chunk)
