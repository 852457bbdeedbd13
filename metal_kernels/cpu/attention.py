"""Attention on a CPU over keys and values in float32 or packed: numba for few query rows, BLAS for many.

Both keep a running maximum over chunks of tokens, so that neither all scores nor a packed cache's values are ever
held at once, and both read each key-value head once for all the query heads that share it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from metal_kernels.cpu.exponential import exp_in_place

Array = NDArray[np.float32]
FEW_ROWS = 8
CHUNK = 256
"""Tokens that one task of the few-rows kernel takes."""
TILE = 512
"""Tokens of one product of the many-rows path."""
ROWS_AT_ONCE = 1024
_MATH = {"contract", "arcp", "nsz", "reassoc"}


@dataclass(frozen=True)
class PackedTokens:
    """Keys or values of a cache: codes uint32 (B, H, T, words), scales uint16 bits of float16 (B, H, T, groups).

    table float32 of 2^bits values; `size` values in a token's head.
    """

    codes: NDArray[np.uint32]
    scales: NDArray[np.float16]
    table: Array
    size: int


Tokens = Array | PackedTokens


@dataclass(frozen=True)
class Visibility:
    """What a query row sees: a causal end, an additive bias (B, H, L, T), and a sink logit for each head."""

    causal: bool
    bias: Array | None
    sinks: Array | None


def attend(queries: Array, keys: Tokens, values: Tokens, length: int, scale: float, seen: Visibility) -> Array:
    """softmax(scale * queries keys^T + bias) values over the first `length` tokens: (B, H, L, value size).

    queries (B, H, L, D). Rows that see nothing give zeros.
    """
    path = _few if queries.shape[2] <= FEW_ROWS else _many
    return path(queries, keys, values, length, scale, seen)


def _sizes(tokens: Tokens) -> tuple[int, int]:
    """(heads, size of a head)."""
    if isinstance(tokens, PackedTokens):
        return tokens.codes.shape[1], tokens.size
    return tokens.shape[1], tokens.shape[3]


def _grouped(queries: Array, heads: int) -> Array:
    """Queries as (B, key-value heads, query heads of each * L, D), contiguous."""
    batch, _, _, size = queries.shape
    return np.ascontiguousarray(queries).reshape(batch, heads, -1, size)


def _few(queries: Array, keys: Tokens, values: Tokens, length: int, scale: float, seen: Visibility) -> Array:
    batch, n_heads, rows_per_head, _ = queries.shape
    heads, size = _sizes(values)
    grouped = _grouped(queries, heads)
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
            _half_table(),
            *common,
        )
    else:
        _float_chunks(grouped, _whole(keys), _whole(values), *common)
    out = np.empty((batch, heads, grouped.shape[2], size), np.float32)
    _combine(partial, state, _sinks(seen.sinks, n_heads), rows_per_head, out)
    return out.reshape(batch, n_heads, rows_per_head, size)


def _whole(tokens: Tokens) -> Array:
    """Float tokens as a contiguous array, without a copy where they are the first ones of a cache's buffer.

    The array may have room for more tokens than were given; only with a known layout do loops over it vectorise.
    """
    assert not isinstance(tokens, PackedTokens)
    batch, heads, _, size = tokens.shape
    per_batch, per_head, per_token, per_value = tokens.strides
    room = per_head // per_token if per_token else 0
    if per_value != 4 or per_token != 4 * size or per_head != room * per_token or (
        batch > 1 and per_batch != heads * per_head
    ):
        return np.ascontiguousarray(tokens)
    strides = (heads * per_head, per_head, 4 * size, 4)
    return np.lib.stride_tricks.as_strided(tokens, (batch, heads, room, size), strides)


def _sinks(sinks: Array | None, heads: int) -> Array:
    return np.full(heads, -np.inf, np.float32) if sinks is None else sinks


_HALVES: list[Array] = []


def _half_table() -> Array:
    """float32 of all 65,536 float16 bit patterns: numba has no float16."""
    if not _HALVES:
        _HALVES.append(np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32))
    return _HALVES[0]


@njit(cache=True, fastmath=_MATH, nogil=True)
def _chunk(
    q: Any,
    k: Any,
    v: Any,
    scale: Any,
    first: Any,
    stops: Any,
    biased: Any,
    bias: Any,
    per_head: Any,
    head: Any,
    acc: Any,
    state: Any,
    scores: Any,
    scratch: Any,
) -> None:
    """One chunk of tokens, k and v (tokens, size), for all rows of q: weighted sums, maxima and totals."""
    tokens, rows = k.shape[0], q.shape[0]
    for t in range(tokens):
        key = k[t]
        for r in range(rows):
            query, dot = q[r], np.float32(0.0)
            for d in range(key.shape[0]):
                dot += query[d] * key[d]
            scores[r, t] = dot * scale
    for r in range(rows):
        row, sums = scores[r], acc[r]
        seen = min(tokens, max(0, stops[r % per_head] - first))
        if biased:
            own = bias[head * (rows // per_head) + r // per_head, r % per_head]
            for t in range(seen):
                row[t] += own[first + t]
        top = np.float32(-np.inf)
        for t in range(seen):
            top = max(top, row[t])
        sums[:] = np.float32(0.0)
        state[r, 0], state[r, 1] = top, np.float32(0.0)
        if top == np.float32(-np.inf):
            continue
        for t in range(seen):
            row[t] -= top
        exp_in_place(row[:seen], scratch[:seen])
        total = np.float32(0.0)
        for t in range(seen):
            total += row[t]
        state[r, 1] = total
    for t in range(tokens):
        value = v[t]
        for r in range(rows):
            if first + t < stops[r % per_head] and state[r, 1] > 0:
                weight, sums = scores[r, t], acc[r]
                for d in range(value.shape[0]):
                    sums[d] += weight * value[d]


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
        scores, scratch = np.empty((rows, CHUNK), np.float32), np.empty(CHUNK, np.int32)
        own = bias[b if biased else 0]
        _chunk(
            q[b, h],
            k[b, h, first:last],
            v[b, h, first:last],
            scale,
            first,
            _stops(length, per_head, causal),
            biased,
            own,
            per_head,
            h,
            partial[b, h, c],
            state[b, h, c],
            scores,
            scratch,
        )


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
        scores, scratch = np.empty((rows, CHUNK), np.float32), np.empty(CHUNK, np.int32)
        own = bias[b if biased else 0]
        keys = np.empty((last - first, q.shape[3]), np.float32)
        values = np.empty((last - first, partial.shape[4]), np.float32)
        _decode(k[b, h, first:last], k_scales[b, h, first:last], k_table, halves, keys)
        _decode(v[b, h, first:last], v_scales[b, h, first:last], v_table, halves, values)
        _chunk(
            q[b, h],
            keys,
            values,
            scale,
            first,
            _stops(length, per_head, causal),
            biased,
            own,
            per_head,
            h,
            partial[b, h, c],
            state[b, h, c],
            scores,
            scratch,
        )


@njit(cache=True, nogil=True)
def _decode(codes: Any, scales: Any, table: Any, halves: Any, out: Any) -> None:
    """Values (tokens, size), still rotated, of canonical codes (tokens, words) and scales (tokens, groups)."""
    size, groups = out.shape[1], scales.shape[1]
    bits, group = codes.shape[1] * 32 // size, size // groups
    mask = np.uint32((1 << bits) - 1)
    for t in range(out.shape[0]):
        words, values = codes[t], out[t]
        for g in range(groups):
            scale = halves[scales[t, g]]
            for i in range(g * group, (g + 1) * group):
                bit = i * bits
                word, shift = bit >> 5, bit & 31
                code = words[word] >> np.uint32(shift)
                if shift + bits > 32:
                    code |= words[word + 1] << np.uint32(32 - shift)
                values[i] = table[code & mask] * scale


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
                    if state[b, h, c, r, 1] > 0:
                        weight = np.float32(np.exp(state[b, h, c, r, 0] - top))
                        total += weight * state[b, h, c, r, 1]
                        sums = partial[b, h, c, r]
                        for d in range(size):
                            result[d] += weight * sums[d]
                if total > 0:
                    for d in range(size):
                        result[d] /= total


def _many(queries: Array, keys: Tokens, values: Tokens, length: int, scale: float, seen: Visibility) -> Array:
    batch, n_heads, per_head, _ = queries.shape
    heads, size = _sizes(values)
    grouped = _grouped(queries * np.float32(scale), heads)
    out = np.empty((batch, heads, grouped.shape[2], size), np.float32)
    sinks = _sinks(seen.sinks, n_heads)
    bias = None if seen.bias is None else np.broadcast_to(seen.bias, (batch, n_heads, per_head, length))
    for b in range(batch):
        for h in range(heads):
            read_keys, read_values = _reader(keys, b, h), _reader(values, b, h)
            shared = grouped.shape[2] // per_head
            own = None if bias is None else bias[b, h * shared : (h + 1) * shared]
            _head(
                grouped[b, h],
                read_keys,
                read_values,
                length,
                per_head,
                seen.causal,
                own,
                sinks[h * shared : (h + 1) * shared],
                out[b, h],
            )
    return out.reshape(batch, n_heads, per_head, size)


def _reader(tokens: Tokens, b: int, h: int) -> Callable[[int, int], Array]:
    """A function of (first, last) that gives those tokens of one head as float32 (tokens, size)."""
    if not isinstance(tokens, PackedTokens):
        return lambda first, last: tokens[b, h, first:last]
    scratch = np.empty((TILE, tokens.size), np.float32)
    scales = tokens.scales.view(np.uint16)

    def read(first: int, last: int) -> Array:
        tile = scratch[: last - first]
        _decode_tile(tokens.codes[b, h, first:last], scales[b, h, first:last], tokens.table, _half_table(), tile)
        return tile

    return read


@njit(cache=True, parallel=True, nogil=True)
def _decode_tile(codes: Any, scales: Any, table: Any, halves: Any, out: Any) -> None:
    for part in prange((out.shape[0] + 31) // 32):
        first, last = 32 * part, min(out.shape[0], 32 * part + 32)
        _decode(codes[first:last], scales[first:last], table, halves, out[first:last])


def _head(
    queries: Array,
    read_keys: Callable[[int, int], Array],
    read_values: Callable[[int, int], Array],
    length: int,
    per_head: int,
    causal: bool,
    bias: Array | None,
    sinks: Array,
    out: Array,
) -> None:
    """All query rows of one key-value head, tile by tile of tokens; queries are scaled already."""
    rows = queries.shape[0]
    state = np.empty((rows, 2), np.float32)
    state[:, 0] = np.repeat(sinks, per_head)
    state[:, 1] = np.isfinite(state[:, 0])
    out[:] = 0.0
    before = length - per_head
    for first in range(0, length, TILE):
        last = min(length, first + TILE)
        keys, values = read_keys(first, last), read_values(first, last)
        for start in range(0, rows, ROWS_AT_ONCE):
            stop = min(rows, start + ROWS_AT_ONCE)
            if causal and before + _last_position(start, stop, per_head) < first:
                continue
            scores = queries[start:stop] @ keys.T
            if bias is not None:
                scores += (
                    bias.reshape(rows, -1)[start:stop, first:last]
                    if bias.flags.c_contiguous
                    else np.stack([bias[r // per_head, r % per_head, first:last] for r in range(start, stop)])
                )
            _weigh(scores, state[start:stop], out[start:stop], start, per_head, before + 1 - first, causal)
            out[start:stop] += scores @ values
    _normalise(out, state)


def _last_position(start: int, stop: int, per_head: int) -> int:
    """The greatest position within a head among rows start to stop."""
    return per_head - 1 if start // per_head != (stop - 1) // per_head else (stop - 1) % per_head


@njit(cache=True, parallel=True, fastmath=_MATH, nogil=True)
def _weigh(scores: Any, state: Any, out: Any, start: Any, per_head: Any, visible: Any, causal: Any) -> None:
    """Turn a tile's scores into weights under the running maximum, and rescale what was summed before."""
    for i in prange(scores.shape[0]):
        row, sums = scores[i], out[i]
        seen = row.shape[0]
        if causal:
            seen = min(seen, max(0, visible + (start + i) % per_head))
        before = state[i, 0]
        top = before
        for t in range(seen):
            top = max(top, row[t])
        row[seen:] = np.float32(0.0)
        if top == np.float32(-np.inf):
            row[:seen] = np.float32(0.0)
            continue
        for t in range(seen):
            row[t] -= top
        exp_in_place(row[:seen], np.empty(seen, np.int32))
        total = np.float32(0.0)
        for t in range(seen):
            total += row[t]
        kept = np.float32(np.exp(before - top)) if before > np.float32(-np.inf) else np.float32(0.0)
        state[i, 0], state[i, 1] = top, state[i, 1] * kept + total
        if kept != np.float32(1.0):
            for d in range(sums.shape[0]):
                sums[d] *= kept


@njit(cache=True, nogil=True)
def _normalise(out: Any, state: Any) -> None:
    for i in range(out.shape[0]):
        if state[i, 1] > 0:
            inverse = np.float32(1.0) / state[i, 1]
            for d in range(out.shape[1]):
                out[i, d] *= inverse
