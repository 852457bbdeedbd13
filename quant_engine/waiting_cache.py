"""Caches while a model decodes in one call: their last tokens wait apart from the others.

A cache that was lent to the kernels so is of its own kind again as soon as anyone asks it for tokens, or drops some.
"""

from abc import ABCMeta, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeGuard, cast

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from metal_kernels import WAITING, Codes, Heads, Held, gpu_codes
from quant_engine.kv_cache import STEP, TurboQuantKVCache

SHARE = 8
"""Room grows by this share of the tokens held, since a model that decodes in one call is compiled again then."""


class Waiting(metaclass=ABCMeta):
    """What a lent cache has besides: its arrays, the first for those that wait; how the others are packed; `held`
    tokens in them, and `waits` more that wait."""

    heads: Heads
    batch: int
    arrays: Held
    codes: Codes | None
    held: int
    waits: int
    offset: int

    @abstractmethod
    def begin(self, heads: Heads, dtype: mx.Dtype) -> None:
        """Be lent, for tokens of this dtype."""

    @abstractmethod
    def settle(self, keys: mx.array, values: mx.array, held: int) -> None:
        """Take in tokens that waited, when it is of its own kind again."""

    def suits(self, heads: Heads, batch: int, dtype: mx.Dtype) -> bool:
        """Whether it was lent for just these heads, and nobody has dropped tokens since; asked for every token."""
        same = self.heads is heads and self.batch == batch and self.arrays[0].dtype == dtype
        return same and self.offset == self.held + self.waits

    def join(self, kept: mx.array) -> None:
        """One token more waits, with those before it, in this array."""
        self.arrays = (kept, *self.arrays[1:])
        self.waits += 1
        self.offset += 1

    def end(self) -> None:
        """Be of its own kind again; after an exception it is lent as before."""
        own, kind = vars(self), type(self)
        before = dict(own)
        try:
            for name in ("heads", "batch", "arrays", "codes", "held", "waits"):
                own.pop(name, None)
            cast(Any, self).__class__ = _OWN[kind]
            if before.get("waits"):
                waiting = before["heads"].waiting(before["arrays"][0], before["batch"])
                new = waiting[:, :, :, : before["waits"]]
                kind.settle(self, new[0], new[1], before["held"])
        except BaseException:
            own.clear()
            own.update(before)
            cast(Any, self).__class__ = kind
            raise

    def _begin(self, heads: Heads, dtype: mx.Dtype, arrays: Sequence[mx.array], held: int, codes: Codes | None) -> None:
        self.heads, self.batch, self.codes, self.held, self.waits = heads, arrays[0].shape[0], codes, held, 0
        self.arrays = (heads.room(self.batch, dtype), *arrays)


class WaitingKVCache(Waiting, KVCache):
    """mlx-lm's cache, lent."""

    def begin(self, heads: Heads, dtype: mx.Dtype) -> None:
        """As of `Waiting`."""
        self._begin(heads, dtype, (vars(self)["keys"], vars(self)["values"]), self.offset, None)

    def settle(self, keys: mx.array, values: mx.array, held: int) -> None:
        """As of `Waiting`."""
        length, self.offset, self.step = self.offset, held, _growth(held)
        self.update_and_fetch(keys, values)
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

    def settle(self, keys: mx.array, values: mx.array, held: int) -> None:
        """As of `Waiting`."""
        self._expected = held + _growth(held)
        self._settle(keys, values)

    def fits(self, heads: Heads, batch: int) -> bool:
        """Whether a cache holds packed tokens of such heads, and is to hold no others."""
        sides = (self._keys, self._values)
        if not self._packed or self._packed != self.offset or self.config.sink_tokens or self.config.recent_tokens:
            return False
        if any(side.code is None or side.store is None for side in sides):
            return False
        keys, values = (cast(Any, side) for side in sides)
        shaped = keys.store[0].shape[:2] == (batch, heads.kv_count) and keys.code.size == values.code.size == heads.size
        return shaped and gpu_codes(keys.code, values.code) is not None


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
_OWN = {lent: own for own, lent in _LENT.items()}


def _growth(held: int) -> int:
    return STEP * max(1, -(-held // (SHARE * STEP)))


def _is_lent(cache: Any) -> TypeGuard[Waiting]:
    """As isinstance, which takes longer to ask an abstract class; every layer is asked for every token."""
    return type(cache) in _OWN


def can_be_lent(cache: Any, heads: Heads, batch: int, dtype: mx.Dtype) -> bool:
    """Whether a cache holds tokens of such heads, all of them in one way that the kernels take.

    One that was lent for others, or lost tokens since, is of its own kind again.
    """
    if _is_lent(cache):
        if cache.suits(heads, batch, dtype):
            return True
        cache.end()
    if type(cache) is TurboQuantKVCache:
        return WaitingTurboQuantKVCache.fits(cast(WaitingTurboQuantKVCache, cache), heads, batch)
    if type(cache) is not KVCache or cache.keys is None or cache.values is None or not cache.offset:
        return False
    keys, values, shape = cache.keys, cache.values, (batch, heads.kv_count, heads.size)
    return keys.dtype == values.dtype == dtype and (*keys.shape[:2], keys.shape[3]) == shape


def same_length(caches: Sequence[Any]) -> bool:
    """Whether all caches have equally many tokens, and as many of them wait."""
    waiting = {cache.waits if _is_lent(cache) else 0 for cache in caches}
    return len({cache.offset for cache in caches}) == len(waiting) == 1


def lend(cache: Any, heads: Heads, dtype: mx.Dtype) -> Waiting:
    """The same cache, lent, with room for one token more to wait; see `can_be_lent`."""
    if _is_lent(cache) and cache.waits == WAITING:
        cache.end()
    if not _is_lent(cache):
        cache.__class__ = _LENT[type(cache)]
        cache.begin(heads, dtype)
    return cache
