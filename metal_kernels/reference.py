"""Every operation in plain MLX: the definition that the kernels are tested against."""

import itertools
import math
from collections.abc import Sequence
from functools import cache

import mlx.core as mx

from metal_kernels.layout import bits_of, groups, pack, unpack

SEARCH_FACTORS = tuple(0.70 + 0.05 * i for i in range(13))
"""Starting scales of the search, as multiples of the group's root mean square."""


@cache
def odd_factor(order: int) -> mx.array:
    """The Hadamard matrix of order 12, 20 or 28, float32.

    Made on the CPU: alone, without a power of two, MLX's transform on CUDA does not compile.
    """
    matrix = mx.hadamard_transform(mx.eye(order, stream=mx.cpu), scale=1.0, stream=mx.cpu)
    mx.eval(matrix)
    return matrix


def hadamard(x: mx.array, block: int) -> mx.array:
    """Orthonormal Hadamard transform of each run of `block` values of the last axis: x @ H / sqrt(block)."""
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // block, block)
    return mx.hadamard_transform(blocks, scale=1.0 / math.sqrt(block)).reshape(x.shape)


def inverse_hadamard(x: mx.array, block: int) -> mx.array:
    """The inverse of `hadamard`: x @ H^T / sqrt(block), which differs from it where m is 20 or 28."""
    odd = block // (block & -block)
    m = odd if odd == 1 else odd * 4
    power = block // m
    parts = x.reshape(*x.shape[:-1], -1, m, power)
    scale = 1.0 / math.sqrt(block)
    parts = mx.hadamard_transform(parts, scale=scale) if power > 1 else parts * scale
    if m > 1:
        parts = odd_factor(m).astype(x.dtype) @ parts
    return parts.reshape(x.shape)


def rotate(x: mx.array, signs: mx.array | None, block: int) -> mx.array:
    """x * signs, then the blockwise Hadamard transform; signs None and block 1 leave x as it is."""
    signed = x if signs is None else x * signs.astype(x.dtype)
    return signed if block == 1 else hadamard(signed, block)


def unrotate(x: mx.array, signs: mx.array | None, block: int) -> mx.array:
    """The inverse of `rotate`."""
    straight = x if block == 1 else inverse_hadamard(x, block)
    return straight if signs is None else straight * signs.astype(x.dtype)


def nearest(x: mx.array, codebook: tuple[float, ...]) -> mx.array:
    """Index of the nearest codebook value (ascending) for each x; uint32. Ties take the lower index."""
    index = mx.zeros(x.shape, dtype=mx.uint32)
    for low, high in itertools.pairwise(codebook):
        index = index + (x > (low + high) / 2)
    return index


def fit(x: mx.array, scale: mx.array, codebook: tuple[float, ...]) -> tuple[mx.array, mx.array]:
    """The least-squares scale <x, c> / <c, c> for the codes that `scale` assigns, and its gain <x, c>^2 / <c, c>."""
    values = mx.array(codebook, dtype=mx.float32)[nearest(x / mx.where(scale > 0, scale, 1.0), codebook)]
    along, energy = (x * values).sum(-1, keepdims=True), (values * values).sum(-1, keepdims=True)
    return along / energy, along * along / energy


def search_scales(x: mx.array, codebook: tuple[float, ...]) -> mx.array:
    """The scale of each group x (..., group), float32 (..., 1), that loses least among those tried.

    Each candidate, a multiple of the group's root mean square, assigns codes c; the least-squares scale for them
    leaves an error of <x, x> - <x, c>^2 / <c, c>. The best is refitted once more (a step of Lloyd's alternation).
    """
    rms = mx.sqrt(mx.square(x).mean(-1, keepdims=True))
    best, most = rms, mx.full(rms.shape, -1.0)
    for factor in SEARCH_FACTORS:
        candidate, gain = fit(x, rms * factor, codebook)
        best, most = mx.where(gain > most, candidate, best), mx.maximum(gain, most)
    return mx.maximum(fit(x, best, codebook)[0], 0.0)


def quantize(
    x: mx.array, codebook: tuple[float, ...], group_size: int, search: bool = True
) -> tuple[mx.array, mx.array]:
    """Quantize rotated rows x (rows, width) to packed codes and group scales.

    Returns uint32 (rows, width * bits / 32) and float16 (rows, groups). With `search` the scale is the one of
    least squared error (see `search_scales`), otherwise the group's root mean square.
    """
    bits = bits_of(codebook)
    rows, width = x.shape
    grouped = x.astype(mx.float32).reshape(rows, groups(width, group_size), -1)
    exact = search_scales(grouped, codebook) if search else mx.sqrt(mx.square(grouped).mean(-1, keepdims=True))
    scales = mx.minimum(exact, 65504.0).astype(mx.float16)
    divisor = scales.astype(mx.float32)
    codes = nearest(grouped / mx.where(divisor > 0, divisor, 1.0), codebook)
    return pack(codes.reshape(rows, width), bits), scales.reshape(rows, -1)


def dequantize(
    packed: mx.array, scales: mx.array, codebook: tuple[float, ...], dtype: mx.Dtype = mx.float32
) -> mx.array:
    """Values (..., width) in the rotated domain of packed codes (..., words) and scales (..., groups)."""
    bits = bits_of(codebook)
    width = packed.shape[-1] * 32 // bits
    values = mx.array(codebook, dtype=mx.float32)[unpack(packed, bits, width)]
    grouped = values.reshape(*scales.shape, -1) * scales.astype(mx.float32)[..., None]
    return grouped.reshape(*packed.shape[:-1], width).astype(dtype)


def matmul(x: mx.array, packed: mx.array, scales: mx.array, codebook: tuple[float, ...]) -> mx.array:
    """x (..., width), already rotated, times the transposed packed matrix (out, width): (..., out)."""
    return x @ dequantize(packed, scales, codebook, x.dtype).T


def expert_matmul(x: mx.array, values: Sequence[mx.array], indices: mx.array) -> mx.array:
    """x (..., rows, width), already rotated, times the transposed matrices (out, width) that `indices` choose.

    The axes of x before the last two broadcast to those of indices: (*indices.shape, rows, out).
    """
    return mx.gather_mm(x, mx.stack(list(values)).swapaxes(-1, -2), rhs_indices=indices)


def cache_scales(x: mx.array, codebook: tuple[float, ...]) -> mx.array:
    """Scales (..., 1) of groups x (..., group): the absolute maximum for 256 values, otherwise the root mean square
    refitted twice by least squares to the codes it assigns."""
    if len(codebook) == 256:
        return mx.abs(x).max(-1, keepdims=True)
    scale = mx.sqrt(mx.square(x).mean(-1, keepdims=True))
    for _ in range(2):
        scale = fit(x, scale, codebook)[0]
    return scale


def pack_cache(x: mx.array, codebook: tuple[float, ...], group_size: int) -> tuple[mx.array, mx.array]:
    """Codes uint32 (..., size * bits / 32) and scales float16 (..., size / group_size) of rotated x (..., size)."""
    grouped = x.astype(mx.float32).reshape(*x.shape[:-1], -1, group_size)
    scales = mx.minimum(cache_scales(grouped, codebook), 65504.0).astype(mx.float16)
    divisor = scales.astype(mx.float32)
    scaled = grouped / mx.where(divisor > 0, divisor, 1.0)
    if len(codebook) == 256:
        codes = mx.round((mx.clip(scaled, -1.0, 1.0) + 1.0) * 127.5).astype(mx.uint32)
    else:
        codes = nearest(scaled, codebook)
    return pack(codes.reshape(x.shape), bits_of(codebook)), scales.squeeze(-1)


def packed_attention(
    queries: mx.array,
    keys: tuple[mx.array, mx.array],
    values: tuple[mx.array, mx.array],
    codebooks: tuple[tuple[float, ...], tuple[float, ...]],
    scale: float,
    bias: mx.array | None,
    sinks: mx.array | None,
    tile: int = 512,
) -> mx.array:
    """Attention of rotated queries (B, H, L, D) over packed tokens, tile by tile under a running maximum.

    keys and values are (codes, scales); bias is additive, (B, H, L, T) or what broadcasts to it. The result is still
    in the values' rotated domain, float32.
    """
    batch, heads, rows, size = queries.shape
    kv_heads, length = keys[0].shape[1], keys[0].shape[2]
    q = queries.astype(mx.float32).reshape(batch, kv_heads, -1, size) * scale
    top = (
        mx.full((*q.shape[:3], 1), -mx.inf)
        if sinks is None
        else mx.broadcast_to(mx.repeat(sinks.astype(mx.float32), rows).reshape(1, kv_heads, -1, 1), (*q.shape[:3], 1))
    )
    total = mx.isfinite(top).astype(mx.float32)
    result = mx.zeros((1,))
    for first in range(0, length, tile):
        part = slice(first, min(length, first + tile))
        k = dequantize(keys[0][:, :, part], keys[1][:, :, part], codebooks[0])
        v = dequantize(values[0][:, :, part], values[1][:, :, part], codebooks[1])
        scores = q @ k.swapaxes(-1, -2)
        if bias is not None:
            whole = mx.broadcast_to(bias, (batch, heads, rows, length))[..., part]
            scores = scores + whole.reshape(*scores.shape)
        highest = mx.maximum(top, scores.max(-1, keepdims=True))
        shift = mx.where(mx.isfinite(highest), highest, 0.0)
        weights, kept = mx.exp(scores - shift), mx.exp(top - shift)
        total = total * kept + weights.sum(-1, keepdims=True)
        result, top = result * kept + weights @ v, highest
    return (result / mx.where(total > 0, total, 1.0)).reshape(batch, heads, rows, -1)
