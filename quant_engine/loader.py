"""Loading a model, converted or not, ready to run on this machine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

import metal_kernels
from metal_kernels import AffineWeight, DenseWeight
from quant_engine import mlx_lm_adapter as adapter
from quant_engine import residual, turboquant_mlx
from quant_engine.errors import RecipeError
from quant_engine.experts import DenseExperts, TurboQuantExperts
from quant_engine.fast_layers import fuse_feed_forward, use_fast_norms
from quant_engine.fused_layer import fuse_decoder_layers
from quant_engine.linear import (
    AffineLinear,
    DenseLinear,
    FastEmbedding,
    FastLinear,
    TurboQuantLinear,
    packed_weight,
)
from quant_engine.manifest import Manifest, ModuleEntry
from quant_engine.model_step import fuse_model
from quant_engine.parameters import sanitized
from quant_engine.policy import SMALLEST
from quant_engine.progress import Progress, silent
from quant_engine.quantizer import QuantizedWeight
from quant_engine.shared_input import Branch, branches, stack_biases
from quant_engine.source import Source, resolve
from quant_engine.stream_ends import rotate_between

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


def load_tokenizer(source: Source, settings: Mapping[str, Any] | None = None) -> Any:
    """mlx-lm's tokenizer of a model folder; settings replace those of the folder."""
    return adapter.tokenizer(source.path, source.eos_token_id, settings)


def load_source(source: Source, *, dtype: str | None = None, fuse: bool = True, dequantize: bool = False) -> nn.Module:
    """As `load`, for a source that was resolved already; the model only.

    dequantize: layers that MLX quantized become float ones, at the size in memory that these have.
    """
    manifest, foreign = Manifest.from_config(source.config), turboquant_mlx.block_of(source.config)
    on_cpu = metal_kernels.device() == "cpu"
    chosen = DTYPES[dtype] if dtype else (mx.float32 if on_cpu else None)
    active = chosen or file_dtype(source.config)
    if manifest is not None:
        model = assemble(source.config, manifest, _read(source), active, fuse)
    elif foreign is not None:
        model = _load_turboquant_mlx(source, foreign)
    else:
        model = adapter.load_float(source.path, source.config)
        if dequantize:
            adapter.dequantize(model)
    if on_cpu:
        _use_cpu_layers(model, active, fuse)
    if fuse:
        fuse_feed_forward(model)
    if chosen is not None:
        _cast(model, chosen)
    elif manifest is not None:
        adapter.match_norms(model, active)
    if fuse:
        fuse_decoder_layers(model)
        fuse_model(model)
    adapter.route(model)
    mx.eval(model.parameters())
    return model


def file_dtype(config: Mapping[str, Any]) -> mx.Dtype:
    """The dtype that a config.json states for its weights, by its old name or its new one; bfloat16 for none."""
    text: Mapping[str, Any] = config.get("text_config") or {}
    stated = [str(place.get(name)) for place in (config, text) for name in ("dtype", "torch_dtype")]
    return next((DTYPES[name] for name in stated if name in DTYPES), mx.bfloat16)


def _cast(model: nn.Module, dtype: mx.Dtype) -> None:
    def cast_one(array: mx.array) -> mx.array:
        return array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array

    model.update(cast(dict[str, Any], tree_map(cast_one, model.parameters())))


def _use_cpu_layers(model: nn.Module, dtype: mx.Dtype, fuse: bool) -> None:
    """Put this project's layers where MLX's own CPU products would be many times slower."""
    linear = cast(dict[str, nn.Linear], adapter.linear_modules(model))
    layers = {path: layer for path, layer in linear.items() if min(layer.weight.shape) >= SMALLEST}
    replacements: dict[str, nn.Module] = {}
    for group in adapter.shared_inputs(layers) if fuse else []:
        parts = [layers.pop(path) for path in group]
        rows = [part.weight.shape[0] for part in parts]
        bias = stack_biases([adapter.bias_of(part) for part in parts], rows)
        stacked = DenseLinear(mx.concatenate([part.weight for part in parts]), bias)
        replacements |= zip(group, branches(stacked, rows), strict=True)
    for path, layer in layers.items():
        replacements[path] = DenseLinear(layer.weight, adapter.bias_of(layer))
    for path, module in adapter.expert_modules(model).items():
        replacements[path] = DenseExperts(cast(mx.array, module["weight"]), adapter.bias_of(module))
    for path, module in adapter.linear_modules(model, (nn.QuantizedLinear,)).items():
        layer = cast(nn.QuantizedLinear, module)
        if layer.mode == "affine":
            biases = cast(mx.array, layer["biases"])
            weight = AffineWeight(layer.weight, layer.scales, biases, layer.bits, layer.group_size)
            replacements[path] = AffineLinear(weight, adapter.bias_of(layer))
    for path, module in adapter.linear_modules(model, (nn.Embedding,)).items():
        replacements[path] = FastEmbedding(DenseWeight(cast(nn.Embedding, module).weight), dtype)
    adapter.replace_modules(model, replacements)
    use_fast_norms(model)


def _read(source: Source) -> dict[str, mx.array]:
    """All tensors, not read yet."""
    tensors: dict[str, mx.array] = {}
    for shard in source.shards:
        tensors |= cast(dict[str, mx.array], mx.load(str(shard)))
    return tensors


def _load_turboquant_mlx(source: Source, block: Mapping[str, Any]) -> nn.Module:
    used = {n: a for n, a in _read(source).items() if not n.startswith(turboquant_mlx.SPECULATOR)}
    tensors = sanitized(source.config, used)
    model = adapter.build(source.config)
    found = adapter.linear_modules(model) | adapter.expert_modules(model)
    shapes = {path: cast(mx.array, module["weight"]).shape for path, module in found.items()}
    layers = turboquant_mlx.take_layers(block, shapes, tensors)
    adapter.replace_modules(model, dict.fromkeys(layers, nn.Identity()))
    adapter.quantize_as_stored(model, tensors)
    adapter.set_parameters(model, tensors)
    adapter.replace_modules(model, layers)
    return model


def assemble(
    config: Mapping[str, Any], manifest: Manifest, tensors: dict[str, mx.array], dtype: mx.Dtype, fuse: bool
) -> nn.Module:
    """A converted model of its config.json and its tensors by name, which are taken out of the mapping.

    dtype: of the activations; fuse: layers that share an input are computed together.
    """
    model = adapter.build(config)
    embeddings = adapter.linear_modules(model, (nn.Embedding,))
    layers: dict[str, nn.Module] = {}
    for group in adapter.shared_inputs(manifest.modules) if fuse else []:
        entries = [manifest.modules[path] for path in group]
        if all(_alike(entries[0], entry) for entry in entries):
            layers |= zip(group, _fused(group, manifest, tensors), strict=True)
    for path, entry in manifest.modules.items():
        if path in embeddings:
            ((weight,), _) = _take(path, manifest, tensors)
            layers[path] = FastEmbedding(packed_weight([weight]), dtype)
        elif path not in layers:
            weights, bias = _take(path, manifest, tensors)
            experts = len(entry.shape) == 3
            layers[path] = (
                TurboQuantExperts([[w] for w in weights], bias)
                if experts
                else TurboQuantLinear.from_quantized(weights[0], bias)
            )
    adapter.replace_modules(model, dict.fromkeys(layers, nn.Identity()))
    adapter.set_parameters(model, tensors)
    adapter.replace_modules(model, layers)
    if manifest.stream_block > 1:
        rotate_between(model, manifest.stream_block, manifest.seed)
    return model


def _alike(first: ModuleEntry, other: ModuleEntry) -> bool:
    """Whether two layers' codes can be stacked into one matrix, for each expert if they are experts'."""

    def common(entry: ModuleEntry) -> tuple[object, ...]:
        *experts, _, width = entry.shape
        return entry.bits, entry.group_size, entry.block, width, experts

    return not (first.qjl or other.qjl) and common(first) == common(other)


def _fused(group: tuple[str, ...], manifest: Manifest, tensors: dict[str, mx.array]) -> list[Branch]:
    taken = [_take(path, manifest, tensors) for path in group]
    rows = [weights[0].shape[0] for weights, _ in taken]
    bias = stack_biases([bias for _, bias in taken], rows)
    stacked = list(zip(*(weights for weights, _ in taken), strict=True))
    if len(manifest.modules[group[0]].shape) == 3:
        return branches(TurboQuantExperts(stacked, bias), rows)
    return branches(FastLinear(packed_weight(stacked[0]), bias), rows)


def _take(path: str, manifest: Manifest, tensors: dict[str, mx.array]) -> tuple[list[QuantizedWeight], mx.array | None]:
    """Remove a quantized layer's tensors from `tensors`: its weight, or each expert's, and its bias."""
    entry, seed = manifest.modules[path], manifest.seed
    codebook = manifest.codebook(entry.bits)
    packed, scales = tensors.pop(f"{path}.weight"), tensors.pop(f"{path}.scales")
    errors = None
    if entry.qjl:
        signs, norms = tensors.pop(f"{path}.qjl_signs"), tensors.pop(f"{path}.qjl_norms")
        errors = residual.Residual(signs, norms, entry.shape[1], seed)
    pairs = [(packed, scales)] if packed.ndim == 2 else [(packed[e], scales[e]) for e in range(packed.shape[0])]
    weights = [
        QuantizedWeight(codes, factors, codebook, entry.bits, entry.group_size, seed, entry.block, errors)
        for codes, factors in pairs
    ]
    return weights, tensors.pop(f"{path}.bias", None)
