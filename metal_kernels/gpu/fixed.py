"""What kernels need of a code and a rotation as one array: MLX takes time for every array of a launch."""

import mlx.core as mx
import numpy as np

from metal_kernels.launch import made
from metal_kernels.layout import pack

TABLE_WORDS = 8
"""At the beginning, of a table to decode with."""


def fixed_words(table: mx.array | None, signs: mx.array | None, block: int, width: int) -> mx.array:
    """A table (8,), then `sign_bits`, then the `odd_words` of the Hadamard block's odd factor: uint32."""
    head = mx.zeros((TABLE_WORDS,), mx.uint32) if table is None else table
    return made(mx.concatenate([head, sign_bits(signs, width), odd_words(factors(block)[0])]))


def factors(block: int) -> tuple[int, int]:
    """A block as the size of an odd Hadamard factor, 1, 12, 20 or 28, times a power of two."""
    odd = block // (block & -block)
    odd = 1 if odd == 1 else 4 * odd
    return odd, block // odd


def sign_bits(signs: mx.array | None, width: int) -> mx.array:
    """Signs (width,) of +-1 as one bit each, set for minus: uint32, a multiple of four words, at least 8."""
    bits = mx.zeros((width,), dtype=mx.uint32) if signs is None else (signs < 0).astype(mx.uint32)
    room = max(8 * 32, -(-width // 128) * 128)
    return mx.contiguous(pack(mx.pad(bits, [(0, room - width)])[None], 1)[0])


def odd_words(odd: int) -> mx.array:
    """The small Hadamard matrix (odd, odd) as MLX has it, transposed, unnormalised, float32 as uint32; nothing for 1."""
    if odd == 1:
        return mx.zeros((0,), mx.uint32)
    matrix = mx.hadamard_transform(mx.eye(odd, stream=mx.cpu), scale=1.0, stream=mx.cpu)
    return mx.array(np.array(matrix.T).view(np.uint32).reshape(-1))
