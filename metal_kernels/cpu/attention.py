"""Attention on a CPU over keys and values in float32 or packed: numba for few query rows, BLAS for many.

Both keep a running maximum over chunks of tokens, so that neither all scores nor a packed cache's values are ever
held at once, and both read each key-value head once for all the query heads that share it.
"""

from typing import Any

import numpy as np
from numba import njit, prange

from metal_kernels.cpu.attention_tiles import attend_many
from metal_kernels.cpu.exponential import exp_under_maximum
from metal_kernels.cpu.tokens import (
    MATH,
    Array,
    PackedTokens,
    Tokens,
    Visibility,
    decode,
    grouped_by_head,
    half_table,
    sinks_or_none,
    sizes,
)

FEW_ROWS = 8
CHUNK = 256
"""Tokens that one task of the few-rows kernel takes."""
TILE = 32
"""Tokens that it decodes at once, which stay in the first cache."""


def attend(queries: Array, keys: Tokens, values: Tokens, length: int, scale: float, seen: Visibility) -> Array:
    """softmax(scale * queries keys^T + bias) values over the first `length` tokens: (B, H, L, value size).

    queries (B, H, L, D). Rows that see nothing give zeros.
    """
    path = _few if queries.shape[2] <= FEW_ROWS else attend_many
    return path(queries, keys, values, length, scale, seen)


def _few(queries: Array, keys: Tokens, values: Tokens, length: int, scale: float, seen: Visibility) -> Array:
    batch, n_heads, rows_per_head, _ = queries.shape
    heads, size = sizes(values)
    grouped = grouped_by_head(queries, heads)
    chunks = -(-length // CHUNK)
    partial = np.empty((batch, heads, chunks, grouped.shape[2], size), np.float32)
    state = np.empty((batch, heads, chunks, grouped.shape[2], 2), np.float32)
    bias = (
        np.zeros((1, 1, 1, 1), np.float32)
        if seen.bias is None
        else np.broadcast_to(seen.bias, (batch, n_heads, rows_per_head, length))
    )
    common = (
        np.float32(scale),
        seen.causal and rows_per_head > 1,
        seen.bias is not None,
        bias,
        rows_per_head,
        length,
        partial,
        state,
    )
    if isinstance(keys, PackedTokens) and isinstance(values, PackedTokens):
        _packed_chunks(
            grouped,
            keys.codes,
            keys.scales.view(np.uint16),
            keys.table,
            values.codes,
            values.scales.view(np.uint16),
            values.table,
            half_table(),
            *common,
        )
    else:
        _float_chunks(grouped, _whole(keys), _whole(values), *common)
    out = np.empty((batch, heads, grouped.shape[2], size), np.float32)
    _combine(partial, state, sinks_or_none(seen.sinks, n_heads), rows_per_head, out)
    return out.reshape(batch, n_heads, rows_per_head, size)


def _whole(tokens: Tokens) -> Array:
    """Float tokens as a contiguous array, without a copy where they are the first ones of a cache's buffer.

    The array may have room for more tokens than were given; only with a known layout do loops over it vectorise.
    """
    assert not isinstance(tokens, PackedTokens)
    if tokens.flags.c_contiguous:
        return tokens
    batch, heads, count, size = tokens.shape
    per_batch, per_head, per_token, per_value = tokens.strides
    room = per_head // per_token if per_token else 0
    if (
        per_value != 4
        or per_token != 4 * size
        or per_head != room * per_token
        or room < count  # A single head's stride may be anything.
        or (batch > 1 and per_batch != heads * per_head)
    ):
        return np.ascontiguousarray(tokens)
    strides = (heads * per_head, per_head, 4 * size, 4)
    return np.lib.stride_tricks.as_strided(tokens, (batch, heads, room, size), strides)


@njit(cache=True, fastmath=MATH, nogil=True, forceinline=True)
def _score(q: Any, k: Any, scale: Any, scores: Any) -> None:
    """scores (rows, tokens) of queries q (rows, size) and keys k (tokens, size); four rows share a pass over a key."""
    rows = q.shape[0]
    for first in range(0, rows - rows % 4, 4):
        q0, q1, q2, q3 = q[first], q[first + 1], q[first + 2], q[first + 3]
        for t in range(k.shape[0]):
            key = k[t]
            d0 = d1 = d2 = d3 = np.float32(0.0)
            for d in range(key.shape[0]):
                d0 += q0[d] * key[d]
                d1 += q1[d] * key[d]
                d2 += q2[d] * key[d]
                d3 += q3[d] * key[d]
            scores[first, t], scores[first + 1, t] = d0 * scale, d1 * scale
            scores[first + 2, t], scores[first + 3, t] = d2 * scale, d3 * scale
    for r in range(rows - rows % 4, rows):
        query = q[r]
        for t in range(k.shape[0]):
            key, dot = k[t], np.float32(0.0)
            for d in range(key.shape[0]):
                dot += query[d] * key[d]
            scores[r, t] = dot * scale


@njit(cache=True, fastmath=MATH, nogil=True, forceinline=True)
def _weigh(scores: Any, first: Any, stops: Any, biased: Any, bias: Any, head: Any, state: Any, scratch: Any) -> None:
    """Scores (rows, tokens) of a chunk to weights under its own maximum; state: that and their total, by row."""
    rows, tokens, per_head = scores.shape[0], scores.shape[1], stops.shape[0]
    for r in range(rows):
        row = scores[r]
        seen = min(tokens, max(0, stops[r % per_head] - first))
        if biased:
            own = bias[head * (rows // per_head) + r // per_head, r % per_head]
            for t in range(seen):
                row[t] += own[first + t]
        row[seen:] = np.float32(0.0)
        state[r, 0], state[r, 1] = exp_under_maximum(row[:seen], np.float32(-np.inf), scratch[:seen])


@njit(cache=True, fastmath=MATH, nogil=True, forceinline=True)
def _add(v: Any, weights: Any, sums: Any) -> None:
    """sums (rows, size) plus weights (rows, tokens) times values v (tokens, size); four tokens share a pass of sums."""
    tokens = v.shape[0]
    for t in range(0, tokens - tokens % 4, 4):
        v0, v1, v2, v3 = v[t], v[t + 1], v[t + 2], v[t + 3]
        for r in range(weights.shape[0]):
            w0, w1, w2, w3 = weights[r, t], weights[r, t + 1], weights[r, t + 2], weights[r, t + 3]
            row = sums[r]
            for d in range(row.shape[0]):
                row[d] += (w0 * v0[d] + w1 * v1[d]) + (w2 * v2[d] + w3 * v3[d])
    for t in range(tokens - tokens % 4, tokens):
        value = v[t]
        for r in range(weights.shape[0]):
            weight, row = weights[r, t], sums[r]
            for d in range(value.shape[0]):
                row[d] += weight * value[d]


@njit(cache=True, nogil=True)
def _stops(length: Any, per_head: Any, causal: Any) -> Any:
    """For each row of a head, the number of tokens it sees."""
    stops = np.empty(per_head, np.int64)
    for i in range(per_head):
        stops[i] = length - per_head + i + 1 if causal else length
    return stops


@njit(cache=True, parallel=True, nogil=True)
def _float_chunks(
    q: Any,
    k: Any,
    v: Any,
    scale: Any,
    causal: Any,
    biased: Any,
    bias: Any,
    per_head: Any,
    length: Any,
    partial: Any,
    state: Any,
) -> None:
    batch, heads, chunks, rows = partial.shape[:4]
    for task in prange(batch * heads * chunks):
        b, rest = task // (heads * chunks), task % (heads * chunks)
        h, c = rest // chunks, rest % chunks
        first, last = c * CHUNK, min(length, (c + 1) * CHUNK)
        scores, scratch = np.empty((rows, last - first), np.float32), np.empty(CHUNK, np.int32)
        own = bias[b if biased else 0]
        _score(q[b, h], k[b, h, first:last], scale, scores)
        _weigh(scores, first, _stops(length, per_head, causal), biased, own, h, state[b, h, c], scratch)
        partial[b, h, c, :, :] = np.float32(0.0)
        _add(v[b, h, first:last], scores, partial[b, h, c])


@njit(cache=True, parallel=True, nogil=True)
def _packed_chunks(
    q: Any,
    k: Any,
    k_scales: Any,
    k_table: Any,
    v: Any,
    v_scales: Any,
    v_table: Any,
    halves: Any,
    scale: Any,
    causal: Any,
    biased: Any,
    bias: Any,
    per_head: Any,
    length: Any,
    partial: Any,
    state: Any,
) -> None:
    batch, heads, chunks, rows = partial.shape[:4]
    for task in prange(batch * heads * chunks):
        b, rest = task // (heads * chunks), task % (heads * chunks)
        h, c = rest // chunks, rest % chunks
        first, last = c * CHUNK, min(length, (c + 1) * CHUNK)
        scores, scratch = np.empty((rows, last - first), np.float32), np.empty(CHUNK, np.int32)
        own = bias[b if biased else 0]
        keys, values = np.empty((TILE, q.shape[3]), np.float32), np.empty((TILE, partial.shape[4]), np.float32)
        for t in range(first, last, TILE):
            end = min(last, t + TILE)
            decode(k[b, h, t:end], k_scales[b, h, t:end], k_table, halves, keys[: end - t])
            _score(q[b, h], keys[: end - t], scale, scores[:, t - first : end - first])
        _weigh(scores, first, _stops(length, per_head, causal), biased, own, h, state[b, h, c], scratch)
        partial[b, h, c, :, :] = np.float32(0.0)
        for t in range(first, last, TILE):
            end = min(last, t + TILE)
            decode(v[b, h, t:end], v_scales[b, h, t:end], v_table, halves, values[: end - t])
            _add(values[: end - t], scores[:, t - first : end - first], partial[b, h, c])


@njit(cache=True, nogil=True)
def _combine(partial: Any, state: Any, sinks: Any, per_head: Any, out: Any) -> None:
    """Join the chunks' weighted sums under their common maximum; sinks add to the denominator only."""
    batch, heads, chunks, rows, size = partial.shape
    for b in range(batch):
        for h in range(heads):
            for r in range(rows):
                sink = sinks[h * (rows // per_head) + r // per_head]
                top = sink
                for c in range(chunks):
                    top = max(top, state[b, h, c, r, 0])
                result = out[b, h, r]
                result[:] = np.float32(0.0)
                total = np.float32(np.exp(sink - top)) if sink > np.float32(-np.inf) else np.float32(0.0)
                for c in range(chunks):
                    if state[b, h, c, r, 1] != 0:
                        weight = np.float32(np.exp(state[b, h, c, r, 0] - top))
                        total += weight * state[b, h, c, r, 1]
                        sums = partial[b, h, c, r]
                        for d in range(size):
                            result[d] += weight * sums[d]
                if total != 0:
                    for d in range(size):
                        result[d] /= total
