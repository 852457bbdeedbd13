"""Caches while a model decodes in one call: their last tokens wait apart from the others.

A cache that was lent to the kernels so is of its own kind again as soon as anyone asks it for tokens, or drops some.
"""

from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from metal_kernels import WAITING, Codes, Heads, Held, gpu_codes
from quant_engine.kv_cache import STEP, TurboQuantKVCache

SHARE = 4
"""Room grows by this share of the tokens held, since a model that decodes in one call is compiled again then."""


class Waiting:
    """What a lent cache has besides: its arrays, the first for those that wait; how the others are packed; `held`
    tokens in them, and `waits` more that wait."""

    heads: Heads
    arrays: Held
    codes: Codes | None
    held: int
    waits: int
    offset: int

    def begin(self, heads: Heads, dtype: mx.Dtype) -> None:
        """Be lent, for tokens of this dtype."""
        raise NotImplementedError

    def end(self) -> None:
        """Be of its own kind again."""
        raise NotImplementedError

    def join(self, kept: mx.array) -> None:
        """One token more waits, with those before it, in this array."""
        self.arrays = (kept, *self.arrays[1:])
        self.waits += 1
        self.offset += 1

    def _begin(self, heads: Heads, dtype: mx.Dtype, arrays: Sequence[mx.array], held: int, codes: Codes | None) -> None:
        self.arrays = (heads.room(arrays[0].shape[0], dtype), *arrays)
        self.heads, self.codes, self.held, self.waits = heads, codes, held, 0

    def _end(self, kind: type) -> mx.array | None:
        """Keys and values (2, B, heads, waits, size) that waited; the cache is of this kind then."""
        own, new = vars(self), None
        if own.get("waits"):
            new = self.heads.waiting(self.arrays[0], self.arrays[1].shape[0])[:, :, :, : self.waits]
        for name in ("heads", "arrays", "codes", "held", "waits"):
            own.pop(name, None)
        cast(Any, self).__class__ = kind
        return new


class WaitingKVCache(Waiting, KVCache):
    """mlx-lm's cache, lent."""

    def begin(self, heads: Heads, dtype: mx.Dtype) -> None:
        """As of `Waiting`."""
        self._begin(heads, dtype, (vars(self)["keys"], vars(self)["values"]), self.offset, None)

    def end(self) -> None:
        """As of `Waiting`."""
        held, length = vars(self).get("held", 0), self.offset
        new = self._end(KVCache)
        if new is not None:
            self.offset, self.step = held, _growth(held)
            self.update_and_fetch(new[0], new[1])
            self.offset = length

    def trim(self, n: int) -> int:
        """As mlx-lm's."""
        self.end()
        return self.trim(n)


class WaitingTurboQuantKVCache(Waiting, TurboQuantKVCache):
    """A compressed cache, lent; those that wait are in full precision."""

    def begin(self, heads: Heads, dtype: mx.Dtype) -> None:
        """As of `Waiting`."""
        keys, values = vars(self)["_keys"], vars(self)["_values"]
        codes = gpu_codes(keys.code, values.code)
        self._begin(heads, dtype, (*keys.store, *values.store), vars(self)["_packed"], codes)

    def end(self) -> None:
        """As of `Waiting`."""
        new = self._end(TurboQuantKVCache)
        if new is not None:
            self._settle(new[0], new[1], _growth(self._packed))

    def fits(self, heads: Heads) -> bool:
        """Whether a cache holds packed tokens of such heads and nothing else."""
        sides = (self._keys, self._values)
        if not self._packed or self._packed != self.offset or any(side.code is None for side in sides):
            return False
        keys, values = (cast(Any, side.code) for side in sides)
        return keys.size == values.size == heads.size and gpu_codes(keys, values) is not None


def _lent(kind: type[Waiting], *names: str) -> type[Waiting]:
    """The kind, made to end as soon as one of these attributes is read or set."""

    def intercepted(name: str) -> property:
        def get(cache: Waiting) -> Any:
            cache.end()
            return getattr(cache, name)

        def put(cache: Waiting, value: Any) -> None:
            cache.end()
            setattr(cache, name, value)

        return property(get, put)

    for name in names:
        setattr(kind, name, intercepted(name))
    return kind


_LENT: dict[type, type[Waiting]] = {
    KVCache: _lent(WaitingKVCache, "keys", "values"),
    TurboQuantKVCache: _lent(WaitingTurboQuantKVCache, "_keys", "_values", "_packed"),
}


def _growth(held: int) -> int:
    return STEP * -(-held // (SHARE * STEP))


def can_be_lent(cache: Any, heads: Heads, dtype: mx.Dtype) -> bool:
    """Whether a cache holds tokens of such heads, all of them in one way that the kernels take."""
    if isinstance(cache, Waiting):
        return True
    if type(cache) is TurboQuantKVCache:
        return WaitingTurboQuantKVCache.fits(cast(WaitingTurboQuantKVCache, cache), heads)
    if type(cache) is not KVCache or cache.keys is None or cache.values is None:
        return False
    keys, values = cache.keys, cache.values
    return keys.dtype == values.dtype == dtype and keys.shape[1::2] == (heads.kv_count, heads.size)


def same_length(caches: Sequence[Any]) -> bool:
    """Whether all caches have equally many tokens, and as many of them wait."""
    waiting = {cache.waits if isinstance(cache, Waiting) else 0 for cache in caches}
    return len({cache.offset for cache in caches}) == len(waiting) == 1


def lend(cache: Any, heads: Heads, dtype: mx.Dtype) -> Waiting:
    """The same cache, lent, with room for one token more to wait; see `can_be_lent`."""
    if isinstance(cache, Waiting) and cache.waits == WAITING:
        cache.end()
    if not isinstance(cache, Waiting):
        cache.__class__ = _LENT[type(cache)]
        cache.begin(heads, dtype)
    return cache


def give_back(cache: Any) -> Any:
    """The same cache, of its own kind."""
    if isinstance(cache, Waiting):
        cache.end()
    return cache
