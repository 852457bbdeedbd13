"""Tokens of a cache written in place on a CPU, where MLX would evaluate an array for each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self
from weakref import WeakKeyDictionary

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache
from numpy.typing import NDArray

from metal_kernels import writable

Array = NDArray[np.float32]


@dataclass
class TokenStore:
    """Arrays of MLX (B, heads, room, ...) that were made here and no other cache shares, as NumPy's too.

    `end` tokens were written to them.
    """

    arrays: tuple[mx.array, ...]
    rows: tuple[NDArray[Any], ...]
    end: int

    @classmethod
    def made(cls, held: Sequence[mx.array | None], like: Sequence[NDArray[Any]], at: int, room: int) -> Self:
        """With `room` for tokens like those given, and copies of the first `at` of those held."""
        arrays = tuple(_copied(old, new, at, room) for old, new in zip(held, like, strict=True))
        return cls(arrays, tuple(map(writable, arrays)), at)

    def has(self, held: Sequence[mx.array | None], at: int, end: int) -> bool:
        """Whether these arrays are those held, were written up to `at`, and have room up to `end`."""
        own = all(mine is theirs for mine, theirs in zip(self.arrays, held, strict=True))
        return own and self.end == at and end <= self.rows[0].shape[2]

    def write(self, new: Sequence[NDArray[Any]]) -> None:
        """Add tokens (B, heads, L, ...)."""
        at, self.end = self.end, self.end + new[0].shape[2]
        for rows, part in zip(self.rows, new, strict=True):
            rows[:, :, at : self.end] = part


def stored(
    store: TokenStore | None, held: Sequence[mx.array | None], new: Sequence[NDArray[Any]], at: int, step: int
) -> TokenStore:
    """`store` with `new` tokens from `at` on, made again, `step` tokens at a time, where it is not what is held.

    What is held may be another's too: after a copy of the cache, after tokens were dropped, or where it came from
    elsewhere.
    """
    end = at + new[0].shape[2]
    if store is None or not store.has(held, at, end):
        store = TokenStore.made(held, new, at, at - (at - end) // step * step)
    store.write(new)
    return store


_stores: WeakKeyDictionary[KVCache, TokenStore] = WeakKeyDictionary()


def append(cache: KVCache, keys: Array, values: Array) -> tuple[Array, Array, int]:
    """Add keys and values (B, heads, L, size) to a float32 cache; returns all (B, heads, room, size), and the tokens.

    What the cache holds is an array of MLX as ever.
    """
    store = stored(_stores.get(cache), (cache.keys, cache.values), (keys, values), cache.offset, cache.step)
    _stores[cache] = store
    (cache.keys, cache.values), cache.offset = store.arrays, store.end
    return store.rows[0], store.rows[1], store.end


def _copied(held: mx.array | None, like: NDArray[Any], at: int, room: int) -> mx.array:
    rows = np.zeros((*like.shape[:2], room, *like.shape[3:]), like.dtype)
    if held is not None:
        rows[:, :, :at] = writable(held[:, :, :at].astype(mx.float32) if like.dtype == np.float32 else held[:, :, :at])
    return mx.array(rows)
