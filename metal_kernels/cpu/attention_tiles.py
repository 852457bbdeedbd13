"""Attention of many query rows: tiles of tokens, products by BLAS, a running maximum over the tiles."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, prange

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

TILE = 512
"""Tokens of one product."""
ROWS_AT_ONCE = 1024


def attend_many(queries: Array, keys: Tokens, values: Tokens, length: int, scale: float, seen: Visibility) -> Array:
    """As `attention.attend`, for any number of rows."""
    batch, n_heads, per_head, _ = queries.shape
    heads, size = sizes(values)
    grouped = grouped_by_head(queries * np.float32(scale), heads)
    out = np.empty((batch, heads, grouped.shape[2], size), np.float32)
    sinks = sinks_or_none(seen.sinks, n_heads)
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
        _decode_tile(tokens.codes[b, h, first:last], scales[b, h, first:last], tokens.table, half_table(), tile)
        return tile

    return read


@njit(cache=True, parallel=True, nogil=True)
def _decode_tile(codes: Any, scales: Any, table: Any, halves: Any, out: Any) -> None:
    for part in prange((out.shape[0] + 31) // 32):
        first, last = 32 * part, min(out.shape[0], 32 * part + 32)
        decode(codes[first:last], scales[first:last], table, halves, out[first:last])


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


@njit(cache=True, parallel=True, fastmath=MATH, nogil=True)
def _weigh(scores: Any, state: Any, out: Any, start: Any, per_head: Any, visible: Any, causal: Any) -> None:
    """Turn a tile's scores into weights under the running maximum, and rescale what was summed before."""
    for i in prange(scores.shape[0]):
        row, sums = scores[i], out[i]
        seen = row.shape[0]
        if causal:
            seen = min(seen, max(0, visible + (start + i) % per_head))
        before = state[i, 0]
        row[seen:] = np.float32(0.0)
        top, total = exp_under_maximum(row[:seen], before, np.empty(seen, np.int32))
        if top == np.float32(-np.inf):
            continue
        kept = np.float32(np.exp(before - top)) if before > np.float32(-np.inf) else np.float32(0.0)
        state[i, 0], state[i, 1] = top, state[i, 1] * kept + total
        if kept != np.float32(1.0):
            for d in range(sums.shape[0]):
                sums[d] *= kept


@njit(cache=True, nogil=True)
def _normalise(out: Any, state: Any) -> None:
    for i in range(out.shape[0]):
        if state[i, 1] != 0:
            inverse = np.float32(1.0) / state[i, 1]
            for d in range(out.shape[1]):
                out[i, d] *= inverse
