"""Reading parameters while a rotation is folded into them, or taken out of them again."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from quant_engine.quantizer import CHUNK_VALUES

Turn = Callable[[mx.array], mx.array]
Read = Callable[[int, int], mx.array]


class Turning:
    """Turns the rows of the parameters `rows`, and the outputs of those of `outputs`, and leaves others alone.

    turn: for rows (n, width), `Folding.rotate` or its inverse. A matrix whose outputs are turned is needed whole: the
    last one is held in float32.
    """

    def __init__(self, rows: frozenset[str], outputs: frozenset[str], turn: Turn) -> None:
        self._rows, self._outputs, self._turn = rows, outputs, turn
        self._held: tuple[str, NDArray[np.float32]] = ("", np.empty((0, 0), np.float32))

    def __contains__(self, name: str) -> bool:
        """Whether a parameter is turned."""
        return name in self._rows or name in self._outputs

    def rows(self, name: str, shape: tuple[int, int], read: Read, first: int, last: int) -> mx.array:
        """Rows [first, last) of a parameter, a matrix of `shape` whose rows `read` gives; float32 if it is turned."""
        if name in self._outputs:
            if self._held[0] != name:
                self._held = ("", np.empty((0, 0), np.float32))  # lets go of the last one first
                self._held = (name, self._turned(shape, read))
            return mx.array(self._held[1][first:last])
        values = read(first, last)
        return self._turn(values) if name in self._rows else values

    def _turned(self, shape: tuple[int, int], read: Read) -> NDArray[np.float32]:
        """The matrix with its outputs turned, piece by piece, in place."""
        out, width = shape
        turned = np.empty(shape, np.float32)
        step = max(1, CHUNK_VALUES // width)
        for first in range(0, out, step):
            last = min(first + step, out)
            turned[first:last] = np.asarray(read(first, last).astype(mx.float32))
        step = max(1, CHUNK_VALUES // out)
        for first in range(0, width, step):
            columns = turned[:, first : first + step]
            columns[:] = np.asarray(self._turn(mx.array(np.ascontiguousarray(columns.T)))).T
        return turned
