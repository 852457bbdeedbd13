"""The models that one evaluation compares: a float model with its linear layers quantized in several ways."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import mlx.core as mx
import mlx.nn as nn

from quant_engine import mlx_lm_adapter as adapter
from quant_engine import turboquant_mlx
from quant_engine.blueprint import packed_bytes
from quant_engine.config import QuantConfig
from quant_engine.errors import RecipeError
from quant_engine.experts import DenseExperts, ExpertsLinear, TurboQuantExperts, affine_experts, quantized_experts
from quant_engine.linear import AffineLinear, DenseLinear, TurboQuantLinear
from quant_engine.manifest import Manifest
from quant_engine.policy import Policy
from quant_engine.quantizer import quantize_weight
from quant_engine.source import Source

Method = Literal["float", "affine", "turboquant", "turboquant+qjl"]


@dataclass(frozen=True)
class Variant:
    """A model, the modules that make it this variant, and the size it has as stored.

    bits, group_size: None for full precision. bits_per_weight: of the layers that the recipe quantizes, scales
    included. size_bytes: of the whole model's tensors.
    """

    method: Method
    bits: int | None
    group_size: int | None
    bits_per_weight: float
    size_bytes: int
    model: nn.Module
    modules: Mapping[str, nn.Module]

    @property
    def label(self) -> str:
        """For progress: "affine, 3 bits"."""
        return self.method if self.bits is None else f"{self.method}, {self.bits} bits"

    def logits(self, tokens: mx.array) -> mx.array:
        """Logits (length, vocabulary) of tokens (length,)."""
        if self.modules:
            adapter.replace_modules(self.model, self.modules)
        logits = cast(Callable[[mx.array], mx.array], self.model)(tokens[None])[0]
        mx.eval(logits)
        return logits


@dataclass(frozen=True)
class Recipe:
    """One way to quantize: a method at the bits and groups of a config."""

    method: Method
    config: QuantConfig

    @property
    def label(self) -> str:
        """For progress: "affine, 3 bits"."""
        return f"{self.method}, {self.config.bits} bits"


class FloatModel:
    """A model in full precision whose linear layers can be replaced; load it with `fuse=False`.

    `size_bytes` is the size of its files' tensors. The layers are those that the policy quantizes; `unfitting` are
    those that it would, with the reason why they cannot be: every variant keeps them. Raises RecipeError where no
    layer is left.
    """

    def __init__(self, model: nn.Module, size_bytes: int, policy: Policy) -> None:
        self._model, self._size_bytes, self._policy = model, size_bytes, policy
        layers = layers_of(model)
        decided = {
            path: policy.decide(path, weight_of(layer).shape, keep_unfitting=True) for path, layer in layers.items()
        }
        self._layers = {path: layers[path] for path, decision in decided.items() if decision.quantize}
        self.unfitting = {path: decision.reason for path, decision in decided.items() if not decision.fits}
        if not self._layers:
            why = "; ".join(dict.fromkeys(self.unfitting.values()))
            raise RecipeError(
                f"the policy quantizes no layer of this model, so there is nothing to compare{why and f' ({why})'}"
            )
        self._weights = sum(weight_of(layer).size for layer in self._layers.values())
        self._weight_bytes = sum(weight_of(layer).nbytes for layer in self._layers.values())

    def __len__(self) -> int:
        return len(self._layers)

    def variant(self) -> Variant:
        """The model as it came."""
        bits = 8 * self._weight_bytes / self._weights
        return Variant("float", None, None, bits, self._size_bytes, self._model, self._layers)

    def quantized(self, recipe: Recipe, report: Callable[[], None]) -> Variant:
        """The model with its layers quantized, by this project's codes each at its own bits and groups.

        `report` is called after each layer.
        """
        modules: dict[str, nn.Module] = {}
        stored, policy = 0, replace(self._policy, config=recipe.config)
        for path, layer in self._layers.items():
            made = quantize_layer(layer, recipe if recipe.method == "affine" else _own(recipe, policy, path, layer))
            modules[path], stored = made, stored + made.weight_nbytes
            report()
        config = recipe.config
        size = self._size_bytes - self._weight_bytes + stored
        return Variant(
            recipe.method, config.bits, config.group_size, 8 * stored / self._weights, size, self._model, modules
        )


def _own(recipe: Recipe, policy: Policy, path: str, layer: nn.Module) -> Recipe:
    """The recipe at the bits and groups that the policy gives a layer."""
    bits, group_size = policy.decide(path, weight_of(layer).shape).bits, policy.group_size(path)
    return replace(recipe, config=replace(recipe.config, bits=bits, group_size=group_size))


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a float model, experts' included, by path; load it with `fuse=False`."""
    return adapter.linear_modules(model, (DenseLinear, nn.Linear, DenseExperts)) | adapter.expert_modules(model)


def quantize_layer(layer: nn.Module, recipe: Recipe) -> AffineLinear | TurboQuantLinear | ExpertsLinear:
    """The layer, its bias kept, with its weight quantized by a recipe; experts are never corrected by QJL."""
    weight, bias, config = weight_of(layer), bias_of(layer), recipe.config
    if weight.ndim == 3 and recipe.method == "affine":
        return affine_experts(weight, bias, config.bits, config.group_size)
    if weight.ndim == 3:
        return quantized_experts(weight, bias, config)
    if recipe.method == "affine":
        return AffineLinear.from_dense(weight, bias, config.bits, config.group_size)
    config = replace(config, use_qjl=recipe.method == "turboquant+qjl")
    return TurboQuantLinear.from_quantized(quantize_weight(weight, config), bias)


def weight_of(layer: nn.Module) -> mx.array:
    """The weight (out, in), or (experts, out, in), of a float linear layer, in the precision of its file."""
    return layer.weight if isinstance(layer, DenseLinear | DenseExperts) else cast(mx.array, layer["weight"])


def bias_of(layer: nn.Module) -> mx.array | None:
    """The bias (..., out) of a linear layer, if it has one."""
    return cast(mx.array | None, layer.get("bias"))


def is_converted(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a model that this project or turboquant-mlx converted."""
    return Manifest.from_config(config) is not None or turboquant_mlx.block_of(config) is not None


def converted(model: nn.Module, source: Source) -> tuple[Variant, QuantConfig]:
    """A converted model as it is, loaded with `fuse=False`, and the recipe that it was made by.

    Raises RecipeError where no layer is quantized.
    """
    manifest = Manifest.from_config(source.config)
    if manifest is not None:
        recipe = manifest.config
        shapes = {path: entry.shape for path, entry in manifest.modules.items()}
        stored = sum(map(packed_bytes, manifest.modules.values()))
    else:
        recipe = turboquant_mlx.recipe_of(source.config)
        layers = adapter.linear_modules(model, (TurboQuantLinear, TurboQuantExperts, ExpertsLinear))
        shapes = {path: cast(TurboQuantLinear | ExpertsLinear, layer).shape for path, layer in layers.items()}
        packed = {f"{path}.{part}" for path in layers for part in turboquant_mlx.PARTS}
        stored = sum(info.nbytes for name, info in source.tensors.items() if name in packed)
    if not shapes:
        raise RecipeError(f"{source.name} has no quantized layer, so there is nothing to measure; convert it anew")
    method: Method = "turboquant+qjl" if recipe.use_qjl else "turboquant"
    bits = 8 * stored / sum(map(math.prod, shapes.values()))
    return Variant(method, recipe.bits, recipe.group_size, bits, source.size_bytes, model, {}), recipe
