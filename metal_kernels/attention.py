"""Attention over float or packed keys and values, and the packing of new ones."""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from metal_kernels import reference
from metal_kernels.cpu.arrays import view
from metal_kernels.cpu.attention import attend
from metal_kernels.cpu.hadamard import rotate_rows, unrotate_rows
from metal_kernels.cpu.pack_cache import pack_rows
from metal_kernels.cpu.tokens import PackedTokens, Visibility, lookup_table
from metal_kernels.dispatch import has_kernel, kernel_backend, record
from metal_kernels.errors import ShapeError
from metal_kernels.gpu import attention as gpu
from metal_kernels.gpu import unpacked_attention as unpacked
from metal_kernels.gpu.decode_attention import Codes
from metal_kernels.hadamard import check_rotation, rotate, unrotate
from metal_kernels.layout import bits_of, groups, words

Array = NDArray[np.float32]
Mask = mx.array | str | None
"""None (all is seen), "causal", or an array that broadcasts to (batch, heads, queries, tokens): bool or additive."""


@dataclass(frozen=True, eq=False)
class CacheCode:
    """How the heads of keys, or of values, are coded.

    codebook of 4, 8 or 16 ascending values, or of 256 in even steps, with absolute-maximum scales; group_size values to
    a scale, signs (size,) of +-1 or None and the Hadamard block of the rotation. Raises ShapeError where `size`, the
    values of one head, or the codebook does not fit.
    """

    codebook: tuple[float, ...]
    group_size: int
    signs: mx.array | None
    block: int
    size: int

    def __post_init__(self) -> None:
        words(self.size, bits_of(self.codebook))
        if len(self.codebook) > 16 and not np.allclose(np.diff(self.codebook, 2), 0, atol=1e-6):
            raise ShapeError(f"a codebook of {len(self.codebook)} values in uneven steps; they must be even beyond 16")
        groups(self.size, self.group_size)
        check_rotation(self.size, self.signs, self.block)

    @cached_property
    def lookup(self) -> Array:
        """The codebook as a CPU's kernels look it up."""
        return lookup_table(self.codebook)

    @cached_property
    def sign_row(self) -> Array | None:
        """The signs as a CPU's kernels take them."""
        return None if self.signs is None else view(self.signs.astype(mx.float32))


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    scale: float,
    mask: Mask = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """softmax(scale * queries keys^T + mask) values for float arrays: (B, H, L, value size) in queries' dtype.

    queries (B, H, L, D), keys (B, KV heads, T, D), values (B, KV heads, T, Dv), KV heads dividing H; sinks (H,) are
    logits that only add to each row's denominator. Raises ShapeError where shapes do not fit.
    """
    _check_heads(queries, keys.shape[1], keys.shape[3])
    if has_kernel("attention"):
        mx.eval(queries, keys, values)
        seen = visibility(mask, sinks, keys.shape[2])
        k, v = view(keys.astype(mx.float32)), view(values.astype(mx.float32))
        out = attend(view(queries.astype(mx.float32)), k, v, keys.shape[2], scale, seen)
        return mx.array(out).astype(queries.dtype)
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)


def attention_rows(queries: Array, keys: Array, values: Array, *, length: int, scale: float, mask: Mask) -> Array:
    """On a CPU: as `attention`, for float32 arrays of NumPy, over the first `length` keys and values."""
    record("cpu", "attention")
    return attend(queries, keys, values, length, scale, visibility(mask, None, length))


def pack_cache(x: mx.array, code: CacheCode) -> tuple[mx.array, mx.array]:
    """Rotate and quantize keys or values x (B, KV heads, L, size) of new tokens.

    Returns codes uint32 (B, KV heads, L, size * bits / 32), in the canonical layout, and scales float16
    (B, KV heads, L, size / group_size).
    """
    if x.shape[-1] != code.size:
        raise ShapeError(f"heads of {x.shape[-1]} values for a code of {code.size}")
    backend = kernel_backend("pack_cache", gpu_fits=_fits_gpu(code))
    if backend == "cpu":
        packed, scales = pack_cache_rows(view(x.astype(mx.float32)), code)
        return mx.array(packed), mx.array(scales)
    if backend is not None:
        return gpu.pack(x, _head_code(code))
    return reference.pack_cache(rotate(x.astype(mx.float32), code.signs, code.block), code.codebook, _group(code))


def pack_cache_rows(x: Array, code: CacheCode) -> tuple[NDArray[np.uint32], NDArray[np.float16]]:
    """On a CPU: as `pack_cache`, for float32 arrays of NumPy."""
    record("cpu", "pack_cache")
    rows = rotate_rows(np.ascontiguousarray(x).reshape(-1, code.size), code.sign_row, code.block)
    packed, scales = pack_rows(rows, code.lookup[: len(code.codebook)], _group(code))
    return packed.reshape(*x.shape[:-1], -1), scales.reshape(*x.shape[:-1], -1)


def unpack_cache(packed: mx.array, scales: mx.array, code: CacheCode, dtype: mx.Dtype) -> mx.array:
    """The keys or values (..., size) that codes and scales stand for, in the original domain; plain lazy MLX."""
    rotated = reference.dequantize(packed, scales, code.codebook)
    return reference.unrotate(rotated, code.signs, code.block).astype(dtype)


def packed_attention(
    queries: mx.array,
    keys: tuple[mx.array, mx.array],
    values: tuple[mx.array, mx.array],
    key_code: CacheCode,
    value_code: CacheCode,
    *,
    length: int,
    scale: float,
    mask: Mask = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Attention over the first `length` packed tokens: (B, H, L, value size) in queries' dtype.

    keys and values are (codes, scales) as `pack_cache` makes them, perhaps with room for more tokens. The queries are
    rotated once with the keys' signs, the result is unrotated once; the cache is never expanded to float.
    """
    _check_heads(queries, keys[0].shape[1], key_code.size)
    fits = _fits_gpu(key_code) and _fits_gpu(value_code)
    backend = kernel_backend("packed_attention", gpu_fits=fits)
    if backend == "metal" or backend == "cuda":
        bias = _checked_bias(mask, length)
        kind = gpu.Kind(_head_code(key_code), _head_code(value_code), scale, isinstance(mask, str), backend)
        if not unpacked.pays(queries, kind, keys[0].shape[1], length):
            return gpu.attend(queries, keys, values, kind, length=length, bias=bias, sinks=sinks)
        q = rotate(queries, key_code.signs, key_code.block)
        out = unpacked.attend(q, keys, values, kind, length=length, bias=bias, sinks=sinks)
        return unrotate(out, value_code.signs, value_code.block)
    if backend == "cpu":
        k, v = (tuple(map(view, pair)) for pair in (keys, values))
        out = packed_attention_rows(
            view(queries.astype(mx.float32)), k, v, key_code, value_code,
            length=length, scale=scale, mask=mask, sinks=sinks,
        )  # fmt: skip
        return mx.array(out).astype(queries.dtype)
    q = rotate(queries.astype(mx.float32), key_code.signs, key_code.block)
    held = [(codes[:, :, :length], scales[:, :, :length]) for codes, scales in (keys, values)]
    bias = _bias(_causal(queries.shape[2], length) if isinstance(mask, str) else mask)
    out = reference.packed_attention(q, held[0], held[1], (key_code.codebook, value_code.codebook), scale, bias, sinks)
    return unrotate(out, value_code.signs, value_code.block).astype(queries.dtype)


def packed_attention_rows(
    queries: Array,
    keys: tuple[NDArray[Any], ...],
    values: tuple[NDArray[Any], ...],
    key_code: CacheCode,
    value_code: CacheCode,
    *,
    length: int,
    scale: float,
    mask: Mask = None,
    sinks: mx.array | None = None,
) -> Array:
    """On a CPU: as `packed_attention`, for arrays of NumPy, queries in float32."""
    record("cpu", "packed_attention")
    rows = np.ascontiguousarray(queries).reshape(-1, key_code.size)
    q = rotate_rows(rows, key_code.sign_row, key_code.block).reshape(queries.shape)
    k = PackedTokens(keys[0], keys[1], key_code.lookup, key_code.size)
    v = PackedTokens(values[0], values[1], value_code.lookup, value_code.size)
    out = attend(q, k, v, length, scale, visibility(mask, sinks, length))
    return unrotate_rows(out.reshape(-1, value_code.size), value_code.sign_row, value_code.block).reshape(out.shape)


def gpu_codes(keys: CacheCode, values: CacheCode) -> Codes | None:
    """How a GPU's kernels take keys and values packed so, the same for the same; None where they do not."""
    return (_head_code(keys), _head_code(values)) if _fits_gpu(keys) and _fits_gpu(values) else None


@lru_cache(maxsize=256)
def _fits_gpu(code: CacheCode) -> bool:
    return gpu.fits(code.codebook, code.size)


@lru_cache(maxsize=256)
def _head_code(code: CacheCode) -> gpu.HeadCode:
    """The code as GPU kernels take it."""
    return gpu.HeadCode.of(code.codebook, _group(code), code.signs, code.block, code.size)


def _group(code: CacheCode) -> int:
    return code.group_size or code.size


def _check_heads(queries: mx.array, kv_heads: int, size: int) -> None:
    if queries.ndim != 4 or queries.shape[1] % kv_heads or queries.shape[3] != size:
        raise ShapeError(
            f"queries of shape {queries.shape} for {kv_heads} key-value heads of {size}; they must be "
            "(batch, a multiple of these heads, length, that size)"
        )


def _causal(rows: int, length: int) -> mx.array:
    return mx.arange(length - rows, length)[:, None] >= mx.arange(length)[None]


def _bias(mask: mx.array | None) -> mx.array | None:
    """An additive float32 mask, of four axes."""
    if mask is None:
        return None
    bias = mx.where(mask, 0.0, -mx.inf) if mask.dtype == mx.bool_ else mask.astype(mx.float32)
    return bias.reshape(*[1] * (4 - bias.ndim), *bias.shape)


def _checked_bias(mask: Mask, length: int) -> mx.array | None:
    """As `_bias`; None for "causal". Raises ShapeError for any other word, or where the last axis is not the tokens."""
    if isinstance(mask, str) and mask != "causal":
        raise ShapeError(f"mask {mask!r}; it must be None, 'causal' or an array")
    bias = _bias(None if isinstance(mask, str) else mask)
    if bias is not None and bias.shape[-1] != length:
        raise ShapeError(f"a mask of shape {bias.shape} over {length} tokens; its last axis must be the tokens")
    return bias


def visibility(mask: Mask, sinks: mx.array | None, length: int) -> Visibility:
    """What attention on a CPU takes of a mask over `length` tokens and sinks (H,). Raises ShapeError."""
    bias = _checked_bias(mask, length)
    return Visibility(
        isinstance(mask, str),
        None if bias is None else view(bias),
        None if sinks is None else view(sinks.astype(mx.float32)),
    )
