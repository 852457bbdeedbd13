"""The parameters of a model with norms and the residual stream's rotation folded in (see `folding`)."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from quant_engine.config import QuantConfig
from quant_engine.folding import Folding
from quant_engine.parameters import Parameter, Parameters, by_file
from quant_engine.safetensors_file import TensorInfo
from quant_engine.turning import Turning


class FoldedParameters(Parameters):
    """As `Parameters`, of the same names, shapes and dtypes, with the values of the folded model.

    A reader needs its norm's file beside its own. What is folded is never `stored`; it is read piece by piece all the
    same, but for writers' weights, the last of which is held whole in float32: its outputs are rotated.
    """

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], folding: Folding) -> None:
        super().__init__(config, tensors)
        self._folding = folding
        self._turning = Turning(folding.rows, folding.outputs, folding.rotate)
        self._ones = frozenset(folding.norms.values())
        self._folded = by_file({name: self._fold(parameter) for name, parameter in self._parameters.items()})
        self.stream_block = folding.block if folding.tied else 1

    def __getitem__(self, name: str) -> Parameter:
        return self._folded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._folded)

    @property
    def working_bytes(self) -> int:
        """As of `Parameters`, writers' weights in float32 included."""
        return max(super().working_bytes, *(4 * math.prod(self[name].shape) for name in self._folding.outputs))

    def rows(self, name: str, first: int, last: int, raw: NDArray[np.uint8] | None = None) -> mx.array:
        """As of `Parameters`, float32 for what is rotated."""
        stored = super().rows
        if raw is not None:
            return stored(name, first, last, raw)
        norm = self._folding.norms.get(name)

        def scaled(first: int, last: int) -> mx.array:
            values = stored(name, first, last)
            return values.astype(mx.float32) * stored(norm, 0, 1).astype(mx.float32) if norm else values

        if name in self._ones:
            return mx.ones_like(scaled(first, last))
        return self._turning.rows(name, self[name].matrix, scaled, first, last)

    def _fold(self, parameter: Parameter) -> Parameter:
        folding, name = self._folding, parameter.name
        if name not in self._turning and name not in self._ones:
            return parameter
        norm = folding.norms.get(name)
        files = parameter.files | self._parameters[norm].files if norm else parameter.files
        return replace(parameter, stored=None, files=files, rotated=name in folding.rows)


def parameters_of(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], recipe: QuantConfig) -> Parameters:
    """The parameters that a recipe quantizes: folded where it says so. Raises as `Parameters` and `Folding.of` do."""
    if recipe.fold_rotation:
        return FoldedParameters(config, tensors, Folding.of(config, recipe))
    return Parameters(config, tensors)
