"""What kernels need of a code and a rotation as one array: MLX takes time for every array of a launch."""

import mlx.core as mx

from metal_kernels.launch import made
from metal_kernels.layout import pack

TABLE_WORDS = 4
"""At the beginning, of a table to decode with."""


def fixed_words(table: mx.array, signs: mx.array | None, width: int) -> mx.array:
    """A table (4,), then `sign_bits`: uint32."""
    return made(mx.concatenate([table, sign_bits(signs, width)]))


def factors(block: int) -> tuple[int, int]:
    """A block as the size of an odd Hadamard factor, 1, 12, 20 or 28, times a power of two."""
    odd = block // (block & -block)
    odd = 1 if odd == 1 else 4 * odd
    return odd, block // odd


def sign_bits(signs: mx.array | None, width: int) -> mx.array:
    """Signs (width,) of +-1 as one bit each, set for minus: uint32 (width / 32, at least 8)."""
    bits = mx.zeros((width,), dtype=mx.uint32) if signs is None else (signs < 0).astype(mx.uint32)
    room = max(8 * 32, -(-width // 32) * 32)
    return mx.contiguous(pack(mx.pad(bits, [(0, room - width)])[None], 1)[0])
