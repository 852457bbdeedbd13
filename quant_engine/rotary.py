"""Rotary embeddings of any of mlx-lm's modules as tables of cosines and sines."""

from collections.abc import Callable
from typing import Self

import mlx.core as mx
import numpy as np

from metal_kernels import Turns, writable

FIRST_POSITIONS = 512
TOLERANCE = 1e-4
"""Of the module's own result on numbers of about 1; float32 angles differ by that at positions of some thousands."""

Rope = Callable[..., mx.array]


class Rotary:
    """The cosines and sines by which a rotary embedding turns value i of a head with value i + size / 2."""

    def __init__(self, rope: Rope, size: int) -> None:
        self.rope, self._size = rope, size
        self._table = self._compute(FIRST_POSITIONS)

    @classmethod
    def of(cls, rope: Rope, size: int) -> Self | None:
        """The tables of a module for heads of `size`; None where it does anything else, which is tried."""
        rotary = cls(rope, size)
        x = mx.random.normal((1, 1, 3, size), key=mx.random.key(0))
        values, (cos, sin) = writable(x)[0, 0], rotary.turns(5, 3)
        first, second = np.split(values, 2, axis=1)
        turned = np.concatenate([first * cos - second * sin, first * sin + second * cos], axis=1)
        same = np.allclose(turned, writable(rope(x, offset=5))[0, 0], rtol=0, atol=TOLERANCE)
        return rotary if same else None

    def turns(self, offset: int, length: int) -> Turns:
        """Cosines and sines (length, size / 2), float32, of positions from `offset` on."""
        if offset + length > len(self._table[0]):
            self._table = self._compute(2 * (offset + length))
        cos, sin = self._table
        return cos[offset : offset + length], sin[offset : offset + length]

    def same_as(self, other: Self) -> bool:
        """Whether both turn alike, as their first positions tell."""
        pairs = zip(self.turns(0, FIRST_POSITIONS), other.turns(0, FIRST_POSITIONS), strict=True)
        return all(np.array_equal(mine, theirs) for mine, theirs in pairs)

    def _compute(self, positions: int) -> Turns:
        """What the module makes of heads whose first half is one and whose second half is zero."""
        half = self._size // 2
        x = mx.broadcast_to((mx.arange(self._size) < half).astype(mx.float32), (1, 1, positions, self._size))
        turned = writable(self.rope(mx.contiguous(x), offset=0))[0, 0]
        return np.ascontiguousarray(turned[:, :half]), np.ascontiguousarray(turned[:, half:])


def shared(rotary: Rotary, known: list[Rotary]) -> Rotary:
    """The one among `known` that turns as `rotary` does, or `rotary`, which is then known: layers share long tables."""
    same = next((one for one in known if one.same_as(rotary)), None)
    if same is None:
        known.append(rotary)
    return same or rotary
