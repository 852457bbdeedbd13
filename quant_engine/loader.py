"""Loading a model, converted or not, ready to run on this machine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

import metal_kernels
from metal_kernels import AffineWeight
from quant_engine import mlx_lm_adapter as adapter
from quant_engine import residual
from quant_engine.errors import RecipeError
from quant_engine.linear import (
    AffineLinear,
    Branch,
    DenseLinear,
    FastEmbedding,
    FastLinear,
    TurboQuantLinear,
    branches,
    packed_weight,
)
from quant_engine.manifest import Manifest, ModuleEntry
from quant_engine.progress import Progress, silent
from quant_engine.quantizer import QuantizedWeight
from quant_engine.source import Source, resolve

DTYPES: Mapping[str, mx.Dtype] = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def load(
    model: str | Path,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    fuse: bool = True,
    progress: Progress = silent,
) -> tuple[nn.Module, Any]:
    """Load a model folder or Hub repository: mlx-lm's model and its tokenizer.

    Converted models run on packed weights. dtype is that of the activations: "float32", "float16", "bfloat16";
    by default the file's on a GPU and float32 on a CPU, where others are slower. `fuse` computes layers that read
    the same input (q, k, v; gate, up) as one product. Raises a TurboQuantError that says what is wrong with the
    model.
    """
    if dtype is not None and dtype not in DTYPES:
        raise RecipeError(f"dtype {dtype!r}; choose from {', '.join(DTYPES)}")
    source = resolve(model, revision=revision, progress=progress)
    return load_source(source, dtype=dtype, fuse=fuse), load_tokenizer(source)


def load_tokenizer(source: Source) -> Any:
    """mlx-lm's tokenizer of a model folder."""
    return adapter.tokenizer(source.path, source.eos_token_id)


def load_source(source: Source, *, dtype: str | None = None, fuse: bool = True) -> nn.Module:
    """As `load`, for a source that was resolved already; the model only."""
    manifest = Manifest.from_config(source.config)
    on_cpu = metal_kernels.device() == "cpu"
    chosen = DTYPES[dtype] if dtype else (mx.float32 if on_cpu else None)
    model = adapter.load_float(source.path) if manifest is None else _load_converted(source, manifest, fuse)
    if on_cpu:
        _use_cpu_layers(model, chosen or mx.float32, fuse)
    if chosen is not None:
        _cast(model, chosen)
    adapter.route(model)
    mx.eval(model.parameters())
    return model


def _cast(model: nn.Module, dtype: mx.Dtype) -> None:
    def cast_one(array: mx.array) -> mx.array:
        return array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array

    model.update(cast(dict[str, Any], tree_map(cast_one, model.parameters())))


def _use_cpu_layers(model: nn.Module, dtype: mx.Dtype, fuse: bool) -> None:
    """Put this project's layers where MLX's own CPU products would be many times slower."""
    layers = cast(dict[str, nn.Linear], adapter.linear_modules(model))
    groups = adapter.shared_inputs(layers) if fuse else []
    fused = {path for group in groups for path in group}
    replacements: dict[str, nn.Module] = {}
    for group in groups:
        parts = [layers[path] for path in group]
        stacked = DenseLinear(
            mx.concatenate([p.weight for p in parts]),
            _stack_biases([adapter.bias_of(p) for p in parts], [p.weight.shape[0] for p in parts]),
        )
        replacements |= zip(group, branches(stacked, [p.weight.shape[0] for p in parts]), strict=True)
    for path, layer in layers.items():
        if path not in fused:
            replacements[path] = DenseLinear(layer.weight, adapter.bias_of(layer))
    for path, module in adapter.linear_modules(model, (nn.QuantizedLinear,)).items():
        layer = cast(nn.QuantizedLinear, module)
        if layer.mode == "affine":
            weight = AffineWeight(
                layer.weight, layer.scales, cast(mx.array, layer["biases"]), layer.bits, layer.group_size
            )
            replacements[path] = AffineLinear(weight, adapter.bias_of(layer))
    for path, module in adapter.linear_modules(model, (nn.Embedding,)).items():
        replacements[path] = FastEmbedding(cast(nn.Embedding, module).weight, dtype)
    adapter.replace_modules(model, replacements)


def _stack_biases(biases: list[mx.array | None], rows: list[int]) -> mx.array | None:
    if all(b is None for b in biases):
        return None
    return mx.concatenate(
        [mx.zeros(n) if b is None else b.astype(mx.float32) for b, n in zip(biases, rows, strict=True)]
    )


def _load_converted(source: Source, manifest: Manifest, fuse: bool) -> nn.Module:
    tensors: dict[str, mx.array] = {}
    for shard in source.shards:
        tensors |= cast(dict[str, mx.array], mx.load(str(shard)))
    model = adapter.build(source.config)
    groups = adapter.shared_inputs(manifest.modules) if fuse else []
    layers: dict[str, nn.Module] = {}
    for group in groups:
        entries = [manifest.modules[path] for path in group]
        if all(_alike(entries[0], entry) for entry in entries):
            layers |= zip(group, _fused(group, manifest, tensors), strict=True)
    for path in manifest.modules:
        if path not in layers:
            layers[path] = TurboQuantLinear.from_quantized(*_take(path, manifest, tensors))
    adapter.replace_modules(model, dict.fromkeys(layers, nn.Identity()))
    adapter.set_parameters(model, tensors)
    adapter.replace_modules(model, layers)
    return model


def _alike(first: ModuleEntry, other: ModuleEntry) -> bool:
    """Whether two layers' codes can be stacked into one matrix."""
    return not first.qjl and (first.bits, first.group_size, first.block, first.shape[1], first.qjl) == (
        other.bits,
        other.group_size,
        other.block,
        other.shape[1],
        other.qjl,
    )


def _fused(group: tuple[str, ...], manifest: Manifest, tensors: dict[str, mx.array]) -> list[Branch]:
    taken = [_take(path, manifest, tensors) for path in group]
    rows = [weight.packed.shape[0] for weight, _ in taken]
    bias = _stack_biases([bias for _, bias in taken], rows)
    return branches(FastLinear(packed_weight([weight for weight, _ in taken]), bias), rows)


def _take(path: str, manifest: Manifest, tensors: dict[str, mx.array]) -> tuple[QuantizedWeight, mx.array | None]:
    """Remove a quantized layer's tensors from `tensors` and return it with its bias."""
    entry = manifest.modules[path]
    qjl = (
        residual.Residual(
            tensors.pop(f"{path}.qjl_signs"), tensors.pop(f"{path}.qjl_norms"), entry.shape[1], manifest.seed
        )
        if entry.qjl
        else None
    )
    weight = QuantizedWeight(
        tensors.pop(f"{path}.weight"),
        tensors.pop(f"{path}.scales"),
        manifest.codebook(entry.bits),
        entry.bits,
        entry.group_size,
        manifest.seed,
        entry.block,
        qjl,
    )
    return weight, tensors.pop(f"{path}.bias", None)
