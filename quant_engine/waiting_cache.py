"""mlx-lm's plain cache while a model decodes in one call: its last tokens wait apart from the others."""

from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from metal_kernels import WAITING, Held

STEP, SHARE = 256, 4
"""Room grows by a share of the tokens held, in steps, since a model that decodes in one call is compiled again then."""


class WaitingKVCache(KVCache):
    """A `KVCache` that was lent to the kernels, its keys and values in `held`.

    It is one of mlx-lm's own again as soon as anyone asks it for keys or values, or drops tokens.
    """

    held: Held
    before: int

    @property
    def waits(self) -> int:
        """How many of its tokens wait."""
        return int(self.offset) - self.before

    def join(self, waiting: mx.array) -> None:
        """One token more waits, with those before it, in this array."""
        self.held = (waiting, *self.held[1:])
        self.offset += 1

    def trim(self, n: int) -> int:
        """As mlx-lm's."""
        return give_back(self).trim(n)


def _given_back(name: str) -> Any:
    """A property that makes a cache mlx-lm's own again before its attribute `name` is read or set."""

    def get(cache: KVCache) -> Any:
        return getattr(give_back(cache), name)

    def put(cache: KVCache, value: Any) -> None:
        setattr(give_back(cache), name, value)

    return property(get, put)


for _name in ("keys", "values"):
    setattr(WaitingKVCache, _name, _given_back(_name))


def same_length(caches: Sequence[Any]) -> bool:
    """Whether all are plain caches of equally many tokens, and as many of them wait."""
    lengths = {cache.offset for cache in caches if type(cache) in (KVCache, WaitingKVCache)}
    waiting = {cache.waits if type(cache) is WaitingKVCache else 0 for cache in caches}
    return len(lengths) == 1 and len(waiting) == 1


def lend(cache: KVCache) -> WaitingKVCache:
    """The same cache with room for one token more to wait; it must hold tokens."""
    if type(cache) is WaitingKVCache and cache.waits == WAITING:
        give_back(cache)
    if type(cache) is not WaitingKVCache:
        keys, values = cast(tuple[mx.array, mx.array], (cache.keys, cache.values))
        batch, heads, _, size = keys.shape
        waiting = mx.zeros((2, batch, heads, WAITING, size), keys.dtype)
        cache.__class__ = WaitingKVCache
        lent = cast(WaitingKVCache, cache)
        lent.held, lent.before = (waiting, keys, values), int(cache.offset)
    return cast(WaitingKVCache, cache)


def give_back(cache: KVCache) -> KVCache:
    """The same cache as mlx-lm's own, with all its tokens in its keys and values."""
    if type(cache) is WaitingKVCache:
        (waiting, *_), before, waits = cache.held, cache.before, cache.waits
        del cache.held, cache.before
        cast(Any, cache).__class__ = KVCache
        cache.offset = before
        if waits:
            cache.step = STEP * -(-before // (SHARE * STEP))
            cache.update_and_fetch(*waiting[..., :waits, :])
    return cache
