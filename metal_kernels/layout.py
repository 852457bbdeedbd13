"""How codes lie in 32-bit words: the arithmetic that every backend and the file format share.

The canonical layout, the one on disk, is a dense little-endian bit stream for each row: code i takes bits
[i * bits, (i + 1) * bits) of the row, word by word, low bits first. 32 codes take exactly `bits` words.
"""

import math

import mlx.core as mx

from metal_kernels.errors import ShapeError

WORD_BITS = 32
HADAMARD_FACTORS = (28, 20, 12, 1)
"""Odd factors m of the supported Hadamard sizes m * 2^k, largest first."""


def bits_of(codebook: tuple[float, ...]) -> int:
    """Bits of a code that indexes `codebook`; raises ShapeError unless its length is 2, 4, 8, 16 or 256."""
    bits = round(math.log2(len(codebook))) if codebook else 0
    if len(codebook) not in (2, 4, 8, 16, 256):
        raise ShapeError(f"a codebook of {len(codebook)} values; it must have 2, 4, 8, 16 or 256")
    return bits


def words(width: int, bits: int) -> int:
    """32-bit words that `width` codes of `bits` bits take; raises ShapeError unless they fill whole words."""
    if width <= 0 or width * bits % WORD_BITS:
        raise ShapeError(f"{width} codes of {bits} bits do not fill whole 32-bit words; use a multiple of 32 codes")
    return width * bits // WORD_BITS


def groups(width: int, group_size: int) -> int:
    """Scales in a row of `width`: one for each group, or one for the whole row where group_size is 0."""
    if group_size == 0:
        return 1
    if group_size < 0 or width % group_size:
        raise ShapeError(
            f"groups of {group_size} do not divide a width of {width}; choose a divisor, or 0 for one a row"
        )
    return width // group_size


def hadamard_block(width: int) -> int:
    """The largest m * 2^k, m in HADAMARD_FACTORS, that divides `width`; 1 for odd widths of no such factor."""
    if width <= 0:
        raise ShapeError(f"a width of {width}; it must be positive")
    quotients = ((m, width // m) for m in HADAMARD_FACTORS if width % m == 0)
    return max(m * (rest & -rest) for m, rest in quotients)


def pack(codes: mx.array, bits: int) -> mx.array:
    """Pack codes (..., width), any integer dtype, each below 2^bits, into uint32 words (..., width * bits / 32)."""
    width = codes.shape[-1]
    n_words = words(width, bits)
    shifts = mx.arange(bits, dtype=mx.uint32)
    stream = (codes.astype(mx.uint32)[..., None] >> shifts) & 1
    stream = stream.reshape(*codes.shape[:-1], n_words, WORD_BITS)
    return (stream << mx.arange(WORD_BITS, dtype=mx.uint32)).sum(axis=-1).astype(mx.uint32)


def unpack(packed: mx.array, bits: int, width: int) -> mx.array:
    """Unpack uint32 words (..., width * bits / 32) into uint32 codes (..., width)."""
    if packed.shape[-1] != words(width, bits):
        raise ShapeError(
            f"{packed.shape[-1]} words hold no row of {width} codes of {bits} bits ({words(width, bits)} words)"
        )
    first = mx.arange(width, dtype=mx.uint32) * bits
    word, shift = first // WORD_BITS, first % WORD_BITS
    low = mx.take(packed, word, axis=-1) >> shift
    spill = shift + bits > WORD_BITS
    following = mx.minimum(word + 1, packed.shape[-1] - 1)
    high = mx.take(packed, following, axis=-1) << ((WORD_BITS - shift) % WORD_BITS)
    return mx.where(spill, low | high, low) & ((1 << bits) - 1)
