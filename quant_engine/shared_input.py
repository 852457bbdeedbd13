"""Layers that read the same input, computed as one product: q, k, v; gate and up; those of experts too."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from metal_kernels import split


class SharedInput:
    """Several layers stacked into one, computed when the first of them is called.

    The results wait for their layers, which must be called with the very same array; a layer called with another
    starts a new product.
    """

    def __init__(self, stacked: nn.Module, rows: Sequence[int]) -> None:
        self.stacked = stacked
        self._lazy = "bias" in stacked  # the sum is not computed yet, and is best left to be
        self._ends = [sum(rows[: i + 1]) for i in range(len(rows) - 1)]
        self._input: mx.array | None = None
        self._waiting: dict[int, mx.array] = {}

    def take(self, part: int, x: mx.array, *more: Any, **options: Any) -> mx.array:
        """The output rows of layer `part` for input x; further arguments, the same for all layers, are passed on."""
        if self._input is not x or part not in self._waiting:
            y = cast(Callable[..., mx.array], self.stacked)(x, *more, **options)
            parts = y.split(tuple(self._ends), axis=-1) if self._lazy else split(y, self._ends)
            self._waiting, self._input = dict(enumerate(parts)), x
        y = self._waiting.pop(part)
        if not self._waiting:
            self._input = None
        return y


class Branch(nn.Module):
    """One layer of a `SharedInput`."""

    def __init__(self, shared: SharedInput, part: int) -> None:
        super().__init__()
        self._shared, self._part = shared, part

    @property
    def stacked(self) -> nn.Module:
        """The layer that holds this one and those beside it."""
        return self._shared.stacked

    def __call__(self, x: mx.array, *more: Any, **options: Any) -> mx.array:
        return self._shared.take(self._part, x, *more, **options)


def branches(stacked: nn.Module, rows: Sequence[int]) -> list[Branch]:
    """The layers, of the given output rows in order, that a stacked layer computes together."""
    shared = SharedInput(stacked, rows)
    return [Branch(shared, part) for part in range(len(rows))]


def stack_biases(biases: Sequence[mx.array | None], rows: Sequence[int]) -> mx.array | None:
    """The bias (..., all rows) of stacked layers, zeros for those without; None where none has one."""
    given = [bias for bias in biases if bias is not None]
    if not given:
        return None
    leading = given[0].shape[:-1]
    parts = [
        mx.zeros((*leading, n)) if bias is None else bias.astype(mx.float32)
        for bias, n in zip(biases, rows, strict=True)
    ]
    return mx.concatenate(parts, axis=-1)
