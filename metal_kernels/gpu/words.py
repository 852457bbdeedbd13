"""The words that a lane's codes of a unit lie in, in nibbles or, for NVIDIA, in bytes: see `source/codes.metal`."""

import mlx.core as mx

WORD_BITS = 32
"""Of a word, of which a unit's 32 codes take as many as a code has bits."""


def words_of(codes: mx.array, bits: int, nvidia: bool) -> mx.array:
    """Codes (..., 4 planes, 8), uint32, their sign bit on top, in words (..., bits), uint32."""
    return _in_bytes(codes, bits) if nvidia else _in_nibbles(codes, bits)


def codes_of(words: mx.array, bits: int, nvidia: bool) -> mx.array:
    """The inverse of `words_of`."""
    return _from_bytes(words, bits) if nvidia else _from_nibbles(words, bits)


def _places(step: int) -> mx.array:
    """The first bit of every run of `step` bits of a word."""
    return mx.arange(0, WORD_BITS, step, dtype=mx.uint32)


def _sum(parts: mx.array, step: int) -> mx.array:
    """Words of which each of the last axis has `step` bits."""
    return (parts << _places(step)).sum(-1).astype(mx.uint32)


def _in_nibbles(codes: mx.array, bits: int) -> mx.array:
    if bits == 2:
        return _sum(codes[..., 0::2, :] | (codes[..., 1::2, :] << 2), 4)
    planes = _sum(codes, 4)
    if bits == 4:
        return planes
    return mx.stack([planes[..., i] | (((planes[..., 3] >> i) & 0x11111111) << 3) for i in range(3)], axis=-1)


def _from_nibbles(words: mx.array, bits: int) -> mx.array:
    if bits == 3:
        last = (words >> 3) & 0x11111111
        last = last[..., :1] | (last[..., 1:2] << 1) | (last[..., 2:] << 2)
        words = mx.concatenate([words, last], axis=-1)
    elif bits == 2:
        words = mx.stack([words, words >> 2], axis=-1).reshape(*words.shape[:-1], 4)
    return (words[..., None] >> _places(4)) & ((1 << bits) - 1)


def _in_bytes(codes: mx.array, bits: int) -> mx.array:
    leading = codes.shape[:-2]
    axes = codes.reshape(*leading, 4, 2, 2, 2)  # planes, then h, e and r
    pairs = (axes[..., 0, :] | (axes[..., 1, :] << bits)).reshape(*leading, 4, 4)
    if bits == 2:
        return _sum((pairs[..., 0::2] | (pairs[..., 1::2] << 4)).reshape(*leading, 2, 4), 8)
    if bits == 3:
        last = (pairs[..., 3:, :] >> _places(2)[:3, None]) & 3
        pairs = pairs[..., :3, :] | (last << 6)
    return _sum(pairs, 8)


def _from_bytes(words: mx.array, bits: int) -> mx.array:
    leading = words.shape[:-1]
    pairs = (words[..., None] >> _places(8)) & 255
    if bits == 2:
        pairs = mx.stack([pairs & 15, pairs >> 4], axis=-1)
    elif bits == 3:
        last = ((pairs >> 6) << _places(2)[:3, None]).sum(-2, keepdims=True)
        pairs = mx.concatenate([pairs & 63, last.astype(mx.uint32)], axis=-2)
    pairs = pairs.reshape(*leading, 4, 2, 2)
    return mx.stack([pairs & ((1 << bits) - 1), pairs >> bits], axis=-2).reshape(*leading, 4, 8)
