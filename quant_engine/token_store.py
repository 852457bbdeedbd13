"""Keys and values of mlx-lm's plain cache written in place on a CPU, where MLX would evaluate an array for each."""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache
from numpy.typing import NDArray

from metal_kernels import writable

Array = NDArray[np.float32]


@dataclass
class _Owned:
    """A cache's arrays, which this module made and no other cache shares, and the tokens that it wrote to them."""

    keys: mx.array
    values: mx.array
    key_rows: Array
    value_rows: Array
    end: int


_owned: WeakKeyDictionary[KVCache, _Owned] = WeakKeyDictionary()


def append(cache: KVCache, keys: Array, values: Array) -> tuple[Array, Array, int]:
    """Add keys and values (B, heads, L, size) to a float32 cache; returns all (B, heads, room, size), and the tokens.

    What the cache holds is an array of MLX as ever. It is copied first where it may be another's too: after a copy of
    the cache, after tokens were dropped, or where it came from elsewhere.
    """
    at, end = cache.offset, cache.offset + keys.shape[2]
    owned = _owned.get(cache)
    if owned is None or cache.keys is not owned.keys or owned.end != at or end > owned.key_rows.shape[2]:
        owned = _owned[cache] = _own(cache, keys, values, at, end)
    owned.key_rows[:, :, at:end] = keys
    owned.value_rows[:, :, at:end] = values
    cache.offset = owned.end = end
    return owned.key_rows, owned.value_rows, end


def _own(cache: KVCache, keys: Array, values: Array, at: int, end: int) -> _Owned:
    room = -(-end // cache.step) * cache.step
    cache.keys, cache.values = _copy(cache.keys, keys, room, at), _copy(cache.values, values, room, at)
    return _Owned(cache.keys, cache.values, writable(cache.keys), writable(cache.values), at)


def _copy(held: mx.array | None, new: Array, room: int, at: int) -> mx.array:
    """An array with `room` for tokens like `new`, whose first `at` are those held."""
    array = mx.zeros((*new.shape[:2], room, new.shape[3]))
    mx.eval(array)
    if held is not None:
        writable(array)[:, :, :at] = writable(held[..., :at, :].astype(mx.float32))
    return array
