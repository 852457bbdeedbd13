"""The compressed key-value cache: what mlx-lm's `KVCache` is to a model, at 2 to 8 bits a number.

Keys and values are rotated by random signs and a Hadamard matrix, quantized as they arrive (TurboQuant, arXiv
2504.19874, section 4.2) and attended to as they are: queries are rotated instead, and the weighted sum is turned back
once. Models loaded by this project call `attend`; to any other model the cache gives expanded keys and values.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, cast

import mlx.core as mx
from mlx.utils import tree_unflatten
from mlx_lm.models import cache as mlx_lm_cache
from numpy.typing import NDArray

import metal_kernels
from metal_kernels import CacheCode, ShapeError
from quant_engine import rotation
from quant_engine.codebook import lloyd_max, uniform
from quant_engine.config import GROUP_SIZES, CacheConfig
from quant_engine.errors import InputError, RecipeError
from quant_engine.pacing import under_way
from quant_engine.token_store import Array, TokenStore, stored

STEP = 256
"""Tokens by which storage grows, as mlx-lm's."""

_Pair = tuple[mx.array, mx.array]


@functools.lru_cache(maxsize=64)
def cache_code(size: int, bits: int, group_size: int, seed: int) -> CacheCode:
    """How heads of `size` values are coded; raises RecipeError, naming the groups that fit, where they cannot be."""
    codebook = uniform(8) if bits == 8 else lloyd_max(bits)
    block = rotation.choose_block(size, "auto")
    try:
        return CacheCode(codebook, group_size, mx.array(rotation.signs(size, seed)), block, size)
    except ShapeError as error:
        fitting = [g for g in GROUP_SIZES if (g == 0 or size % g == 0) and size % 32 == 0]
        advice = (
            f"group sizes that fit are {', '.join(map(str, fitting))} (0: the whole head)"
            if fitting
            else ("heads must be a multiple of 32 wide; leave this model's cache as it is")
        )
        raise RecipeError(
            f"heads of {size} cannot be cached at {bits} bits in groups of {group_size}: {advice}"
        ) from error


class _Side:
    """Keys, or values: codes and scales of the packed tokens, with room to grow."""

    def __init__(self, bits: int, group_size: int, seed: int) -> None:
        self._recipe = (bits, group_size, seed)
        self.code: CacheCode | None = None
        self.store: _Pair | None = None
        self._in_place: TokenStore | None = None

    def append(self, x: mx.array, at: int, step: int) -> None:
        """Pack x (B, KV heads, L, size) as the tokens from `at` on; room grows by `step`."""
        self._in_place = None
        new, end = metal_kernels.pack_cache(x, self._code_for(x.shape[-1])), at + x.shape[2]
        under_way.add(new[0])
        self.store = cast(
            _Pair, tuple(_grown(None if self.store is None else self.store[i], new[i], at, end, step) for i in range(2))
        )
        for buffer, part in zip(self.store, new, strict=True):
            buffer[:, :, at:end] = part

    def append_rows(self, x: Array, at: int, step: int) -> tuple[NDArray[Any], ...]:
        """As `append`, of an array of NumPy; returns codes and scales, those of earlier tokens too."""
        new = metal_kernels.pack_cache_rows(x, self._code_for(x.shape[-1]))
        self._in_place = stored(self._in_place, self.store or (None, None), new, at, step)
        self.store = cast(_Pair, self._in_place.arrays)
        return self._in_place.rows

    def _code_for(self, size: int) -> CacheCode:
        if self.code is None:
            self.code = cache_code(size, *self._recipe)
        return self.code

    def expanded(self, length: int, dtype: mx.Dtype) -> mx.array:
        """The first `length` tokens in float, not computed until they are used."""
        assert self.code is not None and self.store is not None
        return _expander(self.code, dtype)(*self.store)[:, :, :length]

    def held(self, length: int) -> _Pair:
        """Codes and scales of the first `length` tokens."""
        assert self.store is not None
        return self.store[0][:, :, :length], self.store[1][:, :, :length]

    @property
    def nbytes(self) -> int:
        return 0 if self.store is None else self.store[0].nbytes + self.store[1].nbytes


def _grown(buffer: mx.array | None, new: mx.array, used: int, needed: int, step: int) -> mx.array:
    """`buffer` with room for `needed` tokens, of which the first `used` are kept."""
    if buffer is not None and buffer.shape[2] >= needed:
        return buffer
    room = -(-(needed - used) // step) * step
    empty = mx.zeros((*new.shape[:2], room, new.shape[3]), dtype=new.dtype)
    return empty if buffer is None else mx.concatenate([buffer[:, :, :used], empty], axis=2)


@functools.lru_cache(maxsize=32)
def _expander(code: CacheCode, dtype: mx.Dtype) -> Callable[[mx.array, mx.array], mx.array]:
    def expand(codes: mx.array, scales: mx.array) -> mx.array:
        return metal_kernels.unpack_cache(codes, scales, code, dtype)

    return cast(Callable[[mx.array, mx.array], mx.array], mx.compile(expand))


class TurboQuantKVCache:
    """One layer's keys and values, compressed as they are added; takes the place of mlx-lm's `KVCache`.

    The first `sink_tokens` and the last `recent_tokens` stay in full precision; while there are such tokens, attention
    expands the rest for the time of each call. Tensors are (batch, KV heads, tokens, head size).
    """

    def __init__(self, config: CacheConfig | None = None) -> None:
        self.config = config or CacheConfig()
        self.offset = 0
        self._keys = _Side(self.config.k_bits, self.config.group_size, self.config.seed)
        self._values = _Side(self.config.v_bits, self.config.group_size, self.config.seed)
        self._packed = 0
        self._expected = 0
        self._sinks: _Pair | None = None
        self._recent: _Pair | None = None
        self._dtype = mx.float32

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> _Pair:
        """Add new tokens; return all keys and values in float, in their original domain, not computed until used."""
        self.add(keys, values)
        return self._all() if self.offset else (keys, values)

    def add(self, keys: mx.array, values: mx.array) -> None:
        """Add new tokens, for `attend` to see."""
        self._dtype = keys.dtype
        self.offset += keys.shape[2]
        new = (keys, values)
        missing = self.config.sink_tokens - _tokens(self._sinks)
        if missing > 0 and self._packed == 0:
            self._sinks, new = _own(_join(self._sinks, _cut(new, 0, missing))), _cut(new, missing)
        if self.config.recent_tokens:
            waiting = _join(self._recent, new)
            settled = max(0, _tokens(waiting) - self.config.recent_tokens)
            new, self._recent = _cut(waiting, 0, settled), _own(_cut(waiting, settled))
        if _tokens(new):
            self._settle(*new)

    def reserve(self, tokens: int) -> None:
        """Make room for so many tokens at once when the next come, instead of copying what is held as it grows."""
        self._expected = self.offset + tokens

    def _growth(self) -> int:
        return STEP * max(1, -(-(self._expected - self._packed) // STEP))

    def _settle(self, keys: mx.array, values: mx.array) -> None:
        """Pack tokens."""
        step = self._growth()
        self._keys.append(keys, self._packed, step)
        self._values.append(values, self._packed, step)
        self._packed += keys.shape[2]

    def _all(self) -> _Pair:
        parts = [p for p in (self._sinks, self._middle(), self._recent) if p is not None and _tokens(p)]
        if len(parts) == 1:
            return parts[0]
        return mx.concatenate([p[0] for p in parts], axis=2), mx.concatenate([p[1] for p in parts], axis=2)

    def _middle(self) -> _Pair | None:
        if not self._packed:
            return None
        return self._keys.expanded(self._packed, self._dtype), self._values.expanded(self._packed, self._dtype)

    def attend(self, queries: mx.array, *, scale: float, mask: Any, sinks: mx.array | None = None) -> mx.array:
        """Attention of queries (B, H, L, head size), whose own tokens were added already: same shape and dtype."""
        if self._packed != self.offset or self._keys.code is None or self._values.code is None:
            return metal_kernels.attention(queries, *self._all(), scale=scale, mask=mask, sinks=sinks)
        assert self._keys.store is not None and self._values.store is not None
        return metal_kernels.packed_attention(
            queries,
            self._keys.store,
            self._values.store,
            self._keys.code,
            self._values.code,
            length=self._packed,
            scale=scale,
            mask=mask,
            sinks=sinks,
        )

    def attend_rows(self, queries: Array, keys: Array, values: Array, *, scale: float, mask: Any) -> Array | None:
        """On a CPU: `add`, then `attend`, for float32 arrays of NumPy, which MLX does not see.

        None, and nothing is added, where the first or last tokens stay in full precision.
        """
        if self.config.sink_tokens or self.config.recent_tokens:
            return None
        self._dtype = mx.float32
        at, step = self._packed, self._growth()
        held = self._keys.append_rows(keys, at, step), self._values.append_rows(values, at, step)
        self._packed += keys.shape[2]
        self.offset = self._packed
        assert self._keys.code is not None and self._values.code is not None
        return metal_kernels.packed_attention_rows(
            queries, *held, self._keys.code, self._values.code, length=self._packed, scale=scale, mask=mask
        )

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """The mask of `length` new tokens, as mlx-lm's models ask for it."""
        return mlx_lm_cache.create_attention_mask(length, self.offset, return_array, window_size)

    def size(self) -> int:
        """Tokens held."""
        return self.offset

    def empty(self) -> bool:
        """Whether no tokens are held."""
        return self.offset == 0

    def is_trimmable(self) -> bool:
        """True: the last tokens can be dropped."""
        return True

    def trim(self, count: int) -> int:
        """Drop up to `count` of the last tokens; returns how many were dropped."""
        count = min(self.offset, count)
        self.offset -= count
        kept_sinks = min(_tokens(self._sinks), self.offset)
        kept_packed = min(self._packed, self.offset - kept_sinks)
        self._recent = _cut(self._recent, 0, self.offset - kept_sinks - kept_packed) if self._recent else None
        self._sinks = _cut(self._sinks, 0, kept_sinks) if self._sinks else None
        self._packed = kept_packed
        return count

    @property
    def nbytes(self) -> int:
        """Bytes allocated: room for tokens to come counts too."""
        windows = sum(a.nbytes for pair in (self._sinks, self._recent) if pair for a in pair)
        return self._keys.nbytes + self._values.nbytes + windows

    @property
    def token_nbytes(self) -> int:
        """Bytes of the tokens held, without room to grow."""
        windows = sum(a.nbytes for pair in (self._sinks, self._recent) if pair for a in pair)
        sides = [a.nbytes for side in (self._keys, self._values) if side.store for a in side.held(self._packed)]
        return sum(sides) + windows

    @property
    def state(self) -> list[Any]:
        """All that `from_state` needs: arrays, numbers and None, as mlx-lm's caches give it."""
        stored: list[Any] = [
            a
            for side in (self._keys, self._values)
            for a in (side.held(self._packed) if side.store is not None else (None, None))
        ]
        windows: list[Any] = [a for pair in (self._sinks, self._recent) for a in (pair or (None, None))]
        sizes = [side.code.size if side.code else 0 for side in (self._keys, self._values)]
        return [
            *stored,
            *windows,
            self.offset,
            self._packed,
            *sizes,
            str(self._dtype).rpartition(".")[2],
            *self.config.to_dict().values(),
        ]

    @state.setter
    def state(self, state: Sequence[Any]) -> None:
        stored, windows = list(state[:4]), list(state[4:8])
        offset, packed, key_size, value_size, dtype = state[8:13]
        self.__init__(CacheConfig(*state[13:]))
        self.offset, self._packed, self._dtype = int(offset), int(packed), getattr(mx, dtype)
        for side, pair, size in ((self._keys, stored[:2], key_size), (self._values, stored[2:], value_size)):
            if pair[0] is not None:
                side.code = cache_code(int(size), *side._recipe)  # pyright: ignore[reportPrivateUsage]
                side.store = (pair[0], pair[1])
        self._sinks = (windows[0], windows[1]) if windows[0] is not None else None
        self._recent = (windows[2], windows[3]) if windows[2] is not None else None

    @classmethod
    def from_state(cls, state: Sequence[Any]) -> Self:
        """The cache whose `state` this was."""
        cache = cls()
        cache.state = state
        return cache

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A branch that goes on by itself; the tokens so far are shared until either adds to them."""
        return self.from_state(self.state)


def _tokens(pair: _Pair | None) -> int:
    return 0 if pair is None else pair[0].shape[2]


def _cut(pair: _Pair, first: int, last: int | None = None) -> _Pair:
    return pair[0][:, :, first:last], pair[1][:, :, first:last]


def _own(pair: _Pair) -> _Pair:
    """The tokens in memory of their own: a part of an array would keep the whole."""
    return mx.contiguous(pair[0]), mx.contiguous(pair[1])


def _join(first: _Pair | None, second: _Pair) -> _Pair:
    if first is None or not _tokens(first):
        return second
    return mx.concatenate([first[0], second[0]], axis=2), mx.concatenate([first[1], second[1]], axis=2)


def convert_cache_to_turboquant(
    cache: Sequence[Any],
    *,
    tq_bits: int | None = None,
    k_bits: int = 8,
    v_bits: int = 4,
    group_size: int = 64,
    sink_tokens: int = 0,
    recent_tokens: int = 0,
    boundary_layers: int = 0,
    seed: int = 0,
) -> list[Any]:
    """A compressed copy of an mlx-lm prompt cache, empty or filled, for mlx-lm's or this project's generation.

    tq_bits sets k_bits and v_bits alike. Only layers with mlx-lm's plain `KVCache` are compressed, but for the
    first and last `boundary_layers` of them; every other layer's cache is the given one. Raises RecipeError
    for bits and groups that do not exist or do not fit the heads, InputError where no layer can be compressed.
    """
    if tq_bits is not None:
        k_bits = v_bits = tq_bits
    config = CacheConfig(k_bits, v_bits, group_size, sink_tokens, recent_tokens, boundary_layers, seed)
    plain = [i for i, layer in enumerate(cache) if _is_plain(layer)]
    chosen = set(plain[boundary_layers : len(plain) - boundary_layers])
    if not chosen:
        kinds = ", ".join(sorted({type(layer).__name__ for layer in cache})) or "none"
        raise InputError(
            f"no layer's cache can be compressed: of {len(cache)} layers ({kinds}) {len(plain)} hold a "
            f"plain KVCache and boundary_layers={boundary_layers} keeps {2 * boundary_layers} of them whole"
        )
    return [_compressed(layer, config) if i in chosen else layer for i, layer in enumerate(cache)]


def _is_plain(layer: Any) -> bool:
    """Whether it is mlx-lm's plain cache; one that waits for kernels is so again once it is asked for its tokens."""
    if isinstance(layer, mlx_lm_cache.KVCache):
        layer.empty()
    return type(layer) is mlx_lm_cache.KVCache


def _compressed(layer: Any, config: CacheConfig) -> TurboQuantKVCache:
    compressed = TurboQuantKVCache(config)
    if not layer.empty() and layer.size():
        compressed.update_and_fetch(*layer.keys_and_values())
    return compressed


def save_cache(file: str | Path, cache: Sequence[Any]) -> None:
    """Save a prompt cache with compressed layers to a safetensors file; they stay compressed."""
    mlx_lm_cache.save_prompt_cache(str(file), list(cache))


def load_cache(file: str | Path) -> list[Any]:
    """Load what `save_cache` saved; raises InputError where the file is none of its files."""
    try:
        loaded = cast(tuple[dict[str, mx.array], dict[str, str]], mx.load(str(file), return_metadata=True))
        arrays, described = loaded
        _, classes, scalars = tree_unflatten(list(described.items()))
        values: dict[str, Any] = dict(arrays)
        for name, kind in scalars[1:]:
            values[name] = _READERS[kind](values[name])
        states = cast(list[Any], tree_unflatten(list(values.items())))
        kinds = [TurboQuantKVCache if name == "TurboQuantKVCache" else getattr(mlx_lm_cache, name) for name in classes]
    except (OSError, RuntimeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{file} is no saved prompt cache ({error}); save one with save_cache") from error
    return [kind.from_state(state) for kind, state in zip(kinds, states, strict=True)]


_READERS: dict[str, Callable[[mx.array], Any]] = {
    "scalar": lambda array: array.item(),
    "string": lambda array: "".join(map(chr, cast(list[int], array.tolist()))),
    "none": lambda array: None,
}
