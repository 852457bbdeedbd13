"""What mlx-lm's model of a config is made of, found by building it without its weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from quant_engine import mlx_lm_adapter as adapter
from quant_engine.errors import CorruptCheckpointError, UnsupportedModelError
from quant_engine.safetensors_file import TensorInfo

SUPPORTED = ("llama", "mistral", "qwen2")
"""Values of `model_type` whose conversion is proven by tests."""


@dataclass(frozen=True)
class Architecture:
    """The parameters of a model by name with their shapes, and the paths of its linear layers in order."""

    parameters: Mapping[str, tuple[int, ...]]
    linear: tuple[str, ...]

    def check(self, tensors: Mapping[str, TensorInfo], unused: set[str]) -> None:
        """Raise CorruptCheckpointError unless the tensors, but for the unused, are the parameters."""
        missing = sorted(set(self.parameters) - set(tensors))
        extra = sorted(set(tensors) - set(self.parameters) - unused)
        wrong = [f"{len(missing)} tensors are missing, the first {missing[0]}"] if missing else []
        wrong += [f"{len(extra)} do not belong to it, the first {extra[0]}"] if extra else []
        wrong += [
            f"{name} is {list(tensors[name].shape)} and the config makes it {list(shape)}"
            for name, shape in self.parameters.items()
            if name in tensors and tensors[name].shape != shape
        ]
        if wrong:
            raise CorruptCheckpointError(
                f"the weights are not those of the model in config.json: {'; '.join(wrong[:3])}; "
                "download the model again, whole"
            )


def describe(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a config. Raises UnsupportedModelError where it is not among SUPPORTED."""
    kind = config.get("model_type")
    if kind not in SUPPORTED:
        known = " (mlx-lm has it; its conversion is not proven yet)" if adapter.supports(config) else ""
        raise UnsupportedModelError(
            f"model_type {kind!r} cannot be converted{known}; those that can are {', '.join(SUPPORTED)}"
        )
    try:
        model = adapter.build(config)
    except (TypeError, KeyError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise CorruptCheckpointError(
            f"config.json does not describe a {kind} model: {error}; download it again"
        ) from error
    shapes = {name: array.shape for name, array in tree_flatten(model.parameters())}
    return Architecture(shapes, tuple(adapter.linear_modules(model)))


def unused_tensors(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> set[str]:
    """Names that mlx-lm's model drops when it loads, such as a tied output projection stored twice."""
    model: Any = adapter.build(config)
    if not hasattr(model, "sanitize"):
        return set()
    kept = model.sanitize({name: mx.zeros(info.shape) for name, info in tensors.items()})
    return set(tensors) - set(kept)
