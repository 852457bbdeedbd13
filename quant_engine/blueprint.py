"""What a conversion will write, worked out from headers alone: used to plan one and to carry it out."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from quant_engine import architecture, rotation
from quant_engine.config import QuantConfig
from quant_engine.errors import RecipeError, UnsupportedModelError
from quant_engine.manifest import METHOD, ModuleEntry
from quant_engine.policy import decide
from quant_engine.safetensors_file import FLOATS, TensorInfo, TensorSpec, assign_shards, file_bytes

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""Names of the dtypes that kept weights can be given, and the file format's."""

MAX_SHARD_BYTES = 5_000_000_000


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
        return sum(entry.shape[0] * entry.shape[1] for entry in self.modules.values())

    @property
    def quantized_bytes(self) -> int:
        """Bytes of codes, scales, and QJL's signs and norms."""
        return sum(spec.nbytes for path, entry in self.modules.items() for spec in packed_tensors(path, entry))

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


def draw(
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    recipe: QuantConfig,
    *,
    dtype: str | None = None,
    keep_unfitting: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Blueprint:
    """The blueprint of converting a model, given its config.json and its tensors' headers.

    Raises UnsupportedModelError, CorruptCheckpointError where config and tensors contradict each other, and
    RecipeError where the recipe does not fit the model's widths.
    """
    if dtype is not None and dtype not in DTYPES:
        raise RecipeError(f"dtype {dtype!r}; choose one of {', '.join(DTYPES)}, or none to keep each as it is")
    check_not_quantized(config)
    model = architecture.describe(config)
    unused = architecture.unused_tensors(config, tensors)
    model.check(tensors, unused)
    linear = set(model.linear)
    modules: dict[str, ModuleEntry] = {}
    excluded = {_module(name): "not used by the model, not copied" for name in sorted(unused)}
    kept: dict[str, TensorSpec] = {}
    written: list[list[TensorSpec]] = []
    for name, info in tensors.items():
        path = _module(name)
        if name in unused:
            continue
        if path in linear and name == f"{path}.weight":
            decision = decide(path, info.shape, recipe, keep_unfitting=keep_unfitting)
            if decision.quantize:
                modules[path] = _entry(info, recipe, decision.bits)
                written.append(packed_tensors(path, modules[path]))
                continue
            excluded[path] = decision.reason
        elif path not in linear:
            excluded[path] = decide(path, info.shape, recipe, keep_unfitting=True).reason or "not a linear layer"
        kept[name] = TensorSpec(name, DTYPES[dtype] if dtype and info.dtype in FLOATS else info.dtype, info.shape)
        written.append([kept[name]])
    parameters = sum(math.prod(shape) for shape in model.parameters.values())
    return Blueprint(modules, excluded, kept, assign_shards(written, max_shard_bytes), parameters)


def check_not_quantized(config: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError where a model is quantized already, naming how."""
    block: Any = config.get("quantization") or config.get("quantization_config")
    if not block:
        return
    settings = cast(dict[str, Any], block) if isinstance(block, dict) else {"quant_method": block}
    method = str(settings.get("quant_method") or settings.get("mode") or "affine")
    if method == METHOD:
        raise UnsupportedModelError(
            "this model was converted by TurboQuant already; run it as it is, or convert the "
            "original model with another recipe"
        )
    raise UnsupportedModelError(
        f"this model is quantized already ({method}); quantizing twice would lose more: give "
        "the original model in float16, bfloat16 or float32"
    )


def _module(name: str) -> str:
    return name.rpartition(".")[0] or name


def _entry(weight: TensorInfo, recipe: QuantConfig, bits: int) -> ModuleEntry:
    if weight.dtype not in FLOATS:
        raise UnsupportedModelError(
            f"tensor {weight.name} is {weight.dtype}; weights must be {', '.join(FLOATS)}: give "
            "the original, unquantized model"
        )
    out, width = weight.shape
    block = rotation.choose_block(width, recipe.rotation)
    return ModuleEntry(bits, recipe.group_size, block, (out, width), recipe.use_qjl)
