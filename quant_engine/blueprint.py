"""What a conversion will write, worked out from headers alone: used to plan one and to carry it out."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quant_engine import architecture, rotation
from quant_engine.config import QuantConfig
from quant_engine.errors import CorruptCheckpointError, RecipeError, UnsupportedModelError
from quant_engine.manifest import ModuleEntry
from quant_engine.parameters import Parameter, Parameters
from quant_engine.policy import Policy, check_wishes
from quant_engine.safetensors_file import FLOATS, TensorSpec, assign_shards, file_bytes

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""Names of the dtypes that kept weights can be given, and the file format's."""

MAX_SHARD_BYTES = 1_000_000_000
"""Of a file of weights; a conversion that was killed goes on after the last one that was finished."""


@dataclass(frozen=True)
class Blueprint:
    """The tensors of a conversion.

    modules: quantized layers by path. excluded: why others are kept. kept: tensors that are copied, with the
    dtype they get. shards: the files and what is in them. parameters: those of the model, in all.
    """

    modules: Mapping[str, ModuleEntry]
    excluded: Mapping[str, str]
    kept: Mapping[str, TensorSpec]
    shards: Mapping[str, list[TensorSpec]]
    parameters: int

    @property
    def quantized_parameters(self) -> int:
        """Weights that are quantized."""
        return sum(math.prod(entry.shape) for entry in self.modules.values())

    @property
    def quantized_bytes(self) -> int:
        """Bytes of codes, scales, and QJL's signs and norms."""
        return sum(map(packed_bytes, self.modules.values()))

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk for each quantized weight, scales and all; 0 where nothing is quantized."""
        return 8 * self.quantized_bytes / self.quantized_parameters if self.modules else 0.0

    @property
    def size_bytes(self) -> int:
        """Exact size of the safetensors files."""
        return sum(file_bytes(shard) for shard in self.shards.values())


def packed_tensors(path: str, entry: ModuleEntry) -> list[TensorSpec]:
    """The tensors of a quantized module, but for its bias."""
    return [TensorSpec(f"{path}.{part}", dtype, shape) for part, (dtype, shape) in entry.tensors().items()]


def packed_bytes(entry: ModuleEntry) -> int:
    """Bytes of a quantized module, but for its bias."""
    return sum(spec.nbytes for spec in packed_tensors("", entry))


def draw(
    config: Mapping[str, Any],
    found: Parameters,
    recipe: QuantConfig,
    *,
    dtype: str | None = None,
    keep_unfitting: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Blueprint:
    """The blueprint of converting a model, given its config.json and its parameters.

    Raises UnsupportedModelError, CorruptCheckpointError where config and tensors contradict each other, and
    RecipeError where the recipe does not fit the model's widths or names layers that it has not.
    """
    if dtype is not None and dtype not in DTYPES:
        raise RecipeError(f"dtype {dtype!r}; choose one of {', '.join(DTYPES)}, or none to keep each as it is")
    model = architecture.describe(config)
    check_wishes(recipe, model)
    model.check(found)
    _check_head(config, found)
    policy = Policy(recipe, str(config["model_type"]), model.layers)
    layers = {*model.linear, *model.experts, *model.embeddings}
    modules: dict[str, ModuleEntry] = {}
    excluded = {_module(name): "not used by the model, not copied" for name in sorted(found.unused)}
    kept: dict[str, TensorSpec] = {}
    written: list[list[TensorSpec]] = []
    for name, parameter in found.items():
        path = _module(name)
        if path in layers and name == f"{path}.weight":
            decision = policy.decide(path, parameter.shape, keep_unfitting=keep_unfitting)
            if decision.quantize:
                corrected = recipe.use_qjl and path not in model.embeddings
                modules[path] = _entry(parameter, recipe, decision.bits, policy.group_size(path), corrected)
                written.append(packed_tensors(path, modules[path]))
                continue
            excluded[path] = decision.reason
        elif path not in layers:
            excluded[path] = policy.decide(path, parameter.shape, keep_unfitting=True).reason or "not a linear layer"
        own = parameter.dtype
        kept[name] = TensorSpec(name, DTYPES[dtype] if dtype and own in FLOATS else own, parameter.shape)
        written.append([kept[name]])
    parameters = sum(math.prod(shape) for shape in model.parameters.values())
    return Blueprint(modules, excluded, kept, assign_shards(written, max_shard_bytes), parameters)


def _check_head(config: Mapping[str, Any], found: Parameters) -> None:
    """Raise CorruptCheckpointError where an output head is stored and left out only because nobody says otherwise."""
    text: Mapping[str, Any] = config.get("text_config") or {}
    stored = [name for name in sorted(found.unused) if name.endswith("lm_head.weight")]
    if stored and "tie_word_embeddings" not in {*config, *text}:
        raise CorruptCheckpointError(
            f"{stored[0]} is stored, and config.json does not say whether the embeddings are used in its place; add "
            '"tie_word_embeddings": false to config.json, or true where both are the same'
        )


def _module(name: str) -> str:
    return name.rpartition(".")[0] or name


def _entry(weight: Parameter, recipe: QuantConfig, bits: int, group_size: int, corrected: bool) -> ModuleEntry:
    if weight.dtype not in FLOATS:
        raise UnsupportedModelError(
            f"tensor {weight.name} is {weight.dtype}; weights must be {', '.join(FLOATS)}: give "
            "the original, unquantized model"
        )
    block = 1 if weight.rotated else rotation.choose_block(weight.shape[-1], recipe.rotation)
    if corrected and len(weight.shape) > 2:
        raise RecipeError(f"{weight.name} holds the weights of experts, for which QJL is not available; leave QJL off")
    return ModuleEntry(bits, group_size, block, weight.shape, corrected)
