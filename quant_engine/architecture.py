"""What mlx-lm's model of a config is made of, found by building it without its weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten

from quant_engine import mlx_lm_adapter as adapter
from quant_engine.errors import CorruptCheckpointError
from quant_engine.parameters import Parameters

_QUANTIZED = (
    "the model is quantized in a way that config.json does not state: give the original in float16, bfloat16 or float32"
)
_FOREIGN = (
    (".lora_", "this is an adapter: merge it into its base first (mlx_lm.fuse, or PEFT's merge_and_unload)"),
    *((mark, _QUANTIZED) for mark in ("weight_scale", "weight_packed", ".qweight", ".qzeros", ".absmax", ".SCB")),
)
"""Parts of the names of tensors that no float model has, and what they say."""

_AGAIN = (
    "download the model again, whole. If it is whole, mlx-lm has another model by that name, and this one can be "
    "neither converted nor run"
)


@dataclass(frozen=True)
class Architecture:
    """The parameters of a model by name with their shapes, the number of its layers, and paths of modules in order.

    linear: linear layers. experts: those of mixtures, one for all experts. embeddings: of tokens.
    """

    parameters: Mapping[str, tuple[int, ...]]
    layers: int
    linear: tuple[str, ...]
    experts: tuple[str, ...]
    embeddings: tuple[str, ...]

    def check(self, found: Parameters) -> None:
        """Raise CorruptCheckpointError unless a checkpoint's parameters are these."""
        missing = sorted(set(self.parameters) - set(found))
        extra = sorted(set(found) - set(self.parameters))
        wrong = [f"{len(missing)} tensors are missing, the first {missing[0]}"] if missing else []
        wrong += [f"{len(extra)} do not belong to it, the first {extra[0]}"] if extra else []
        wrong += [
            f"{name} is {list(found[name].shape)} and the config makes it {list(shape)}"
            for name, shape in self.parameters.items()
            if name in found and found[name].shape != shape
        ]
        if wrong:
            advice = next((text for mark, text in _FOREIGN if any(mark in name for name in extra)), _AGAIN)
            raise CorruptCheckpointError(
                f"the weights are not those of the model in config.json: {'; '.join(wrong[:3])}; {advice}"
            )


def describe(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a config. Raises as `mlx_lm_adapter.build` does."""
    model = adapter.build(config)
    shapes = {name: array.shape for name, array in tree_flatten(model.parameters())}
    return Architecture(
        shapes,
        adapter.layer_count(model),
        tuple(adapter.linear_modules(model)),
        tuple(adapter.expert_modules(model)),
        tuple(adapter.linear_modules(model, (nn.Embedding,))),
    )
