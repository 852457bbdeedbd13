"""What a conversion would give, before it is made: sizes, memory, whether it fits, and what to choose."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import psutil

from quant_engine import blueprint
from quant_engine.config import QuantConfig
from quant_engine.errors import InputError
from quant_engine.folded_parameters import parameters_of
from quant_engine.policy import check_effect
from quant_engine.progress import Progress, silent
from quant_engine.quantizer import quantize_weight
from quant_engine.shards import most_fetched, read_order
from quant_engine.source import INDEX, peek

CACHES = ((16, 16), (8, 8), (8, 4), (4, 4), (3, 3))
"""Bits of keys and values that are compared; 16 is full precision."""

CACHE_GROUP = 64
RUNTIME_BYTES = 600_000_000
"""Python, MLX, compiled kernels, tokenizer, and activations of a prompt's chunk: about 450 MB on Linux, rounded up."""

USABLE = 0.9
"""Share of the available memory that a model may take."""


@dataclass(frozen=True)
class PlanRow:
    """One recipe.

    size_bytes: of the safetensors files, exact. disk_bytes: what converting takes at most: these files, and what of a
    repository's weights is fetched at a time. compression: how many times smaller than the source.
    memory_bytes: to run it, weights, a float16 cache of the plan's context and RUNTIME_BYTES. fits: whether
    that is at most 90 % of the memory available now.
    """

    bits: int
    group_size: int
    bits_per_weight: float
    size_bytes: int
    disk_bytes: int
    compression: float
    memory_bytes: int
    fits: bool


@dataclass(frozen=True)
class PlanCache:
    """Bytes of a key-value cache at the plan's context, for bits of keys and values (16: float16)."""

    k_bits: int
    v_bits: int
    cache_bytes: int


@dataclass(frozen=True)
class Plan:
    """What becomes of a model at each width, and what to choose on this machine.

    memory_to_convert_bytes: what converting takes at most, seconds_to_convert: about how long, as fast as a sample of
    weights was quantized just now, without the download. download_bytes: of weights that are not on this machine yet;
    they are fetched while they are converted. available_memory_bytes, total_memory_bytes: this
    machine's. recommended_bits: 0 where none fits; reason: in a sentence.
    """

    model: str
    revision: str | None
    model_type: str
    parameters: int
    quantized_parameters: int
    source_size_bytes: int
    download_bytes: int
    context: int
    memory_to_convert_bytes: int
    seconds_to_convert: float
    available_memory_bytes: int
    total_memory_bytes: int
    rows: list[PlanRow]
    caches: list[PlanCache]
    excluded: dict[str, str]
    recommended_bits: int
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return asdict(self)


def plan(
    source: str | Path,
    *,
    bits: Sequence[int] = (2, 3, 4),
    group_size: int = 64,
    context: int = 4096,
    use_qjl: bool = False,
    fold_rotation: bool = False,
    widths: Mapping[str, Any] | None = None,
    keep_unfitting: bool = False,
    revision: str | None = None,
    progress: Progress = silent,
) -> Plan:
    """Plan the conversion of a model folder, or of a Hub repository without downloading its weights.

    context: tokens that the key-value cache is to hold. widths: the settings of `QuantConfig` that give modules widths
    of their own. Raises a TurboQuantError as `convert` would.
    """
    if not bits:
        raise InputError("no bits to plan for; give one or more of 2, 3, 4")
    if type(context) is not int or context < 1:
        raise InputError(f"a context of {context!r} tokens; it must be a positive whole number")
    found = peek(source, revision=revision, files=("config.json", INDEX), progress=progress)
    recipes = {
        b: QuantConfig(bits=b, group_size=group_size, use_qjl=use_qjl, fold_rotation=fold_rotation, **(widths or {}))
        for b in sorted(set(bits))
    }
    parameters = parameters_of(found.config, found.tensors, next(iter(recipes.values())))
    drawn = {
        b: blueprint.draw(found.config, parameters, recipe, keep_unfitting=keep_unfitting)
        for b, recipe in recipes.items()
    }
    for b, d in drawn.items():
        check_effect(recipes[b], d.modules, d.excluded)
    caches = [PlanCache(k, v, cache_bytes(found.config, context, k, v)) for k, v in CACHES]
    memory = psutil.virtual_memory()
    rows = [
        _row(
            recipes[b],
            d,
            most_fetched(parameters, read_order(parameters, d.shards), found.missing),
            found.size_bytes,
            caches[0].cache_bytes,
            memory.available,
        )
        for b, d in drawn.items()
    ]
    recommended, reason = _recommend(rows, context, memory.available)
    first = next(iter(drawn.values()))
    return Plan(
        model=found.name,
        revision=found.revision,
        model_type=str(found.config["model_type"]),
        parameters=first.parameters,
        quantized_parameters=first.quantized_parameters,
        source_size_bytes=found.size_bytes,
        download_bytes=sum(found.missing.values()),
        context=context,
        memory_to_convert_bytes=RUNTIME_BYTES + parameters.working_bytes,
        seconds_to_convert=found.size_bytes / conversion_rate(),
        available_memory_bytes=memory.available,
        total_memory_bytes=memory.total,
        rows=rows,
        caches=caches,
        excluded=dict(first.excluded),
        recommended_bits=recommended,
        reason=reason,
    )


def cache_bytes(config: Mapping[str, Any], context: int, k_bits: int, v_bits: int) -> int:
    """Bytes of a key-value cache of `context` tokens: codes, and float16 scales of groups of 64 (16 bits: float16).

    Only layers that attend to all tokens are compressed; those with a sliding window hold float16.
    """
    text: Mapping[str, Any] = config.get("text_config") or config
    heads = text.get("num_key_value_heads") or text["num_attention_heads"]
    size = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    scales = 2 * math.ceil(size / CACHE_GROUP)
    per_head = sum(size * bits // 8 + (scales if bits < 16 else 0) for bits in (k_bits, v_bits))
    windows = heads * min(context, text.get("sliding_window") or context)
    full, sliding = attention_layers(text)
    return full * heads * context * per_head + sliding * windows * size * 2 * 2


def attention_layers(text: Mapping[str, Any]) -> tuple[int, int]:
    """Layers that attend to all tokens, and those that attend to a window; other layers keep no keys and values."""
    count = text["num_hidden_layers"]
    kinds = cast(list[str], text.get("layer_types") or [])
    if kinds:
        return kinds.count("full_attention"), kinds.count("sliding_attention")
    every = text.get("full_attention_interval")
    return (count // every if every else count), 0


def conversion_rate(rows: int = 1024, width: int = 1024) -> float:
    """Bytes of a bfloat16 checkpoint that this machine converts in a second, measured on a sample of weights."""
    sample, recipe = mx.random.normal((rows, width)).astype(mx.bfloat16), QuantConfig()
    times: list[float] = []
    for _ in range(3):
        began = time.perf_counter()
        quantize_weight(sample, recipe)
        times.append(time.perf_counter() - began)
    return sample.nbytes / min(times)


def _row(
    recipe: QuantConfig, drawn: blueprint.Blueprint, fetched: int, source_bytes: int, cache: int, available: int
) -> PlanRow:
    size = drawn.size_bytes
    memory = size + cache + RUNTIME_BYTES
    return PlanRow(
        bits=recipe.bits,
        group_size=recipe.group_size,
        bits_per_weight=drawn.bits_per_weight,
        size_bytes=size,
        disk_bytes=size + fetched,
        compression=source_bytes / size,
        memory_bytes=memory,
        fits=memory <= USABLE * available,
    )


def _recommend(rows: Sequence[PlanRow], context: int, available: int) -> tuple[int, str]:
    """The most bits that fit, and why."""
    have = f"{available / 1e9:.1f} GB of memory available"
    fitting = [row for row in rows if row.fits]
    if not fitting:
        least = min(rows, key=lambda row: row.memory_bytes)
        return 0, (
            f"no width fits: {least.bits} bits with {context:,} tokens take {least.memory_bytes / 1e9:.1f} GB and "
            f"there are {have}; choose a smaller model, a shorter context or a compressed cache"
        )
    best = max(fitting, key=lambda row: row.bits)
    need = f"{best.memory_bytes / 1e9:.1f} GB with {context:,} tokens of float16 cache, of {have}"
    if best.bits == max(row.bits for row in rows):
        return best.bits, f"the most accurate of the widths fits: {need}"
    return best.bits, f"the most accurate width that fits: {need}; more bits do not fit"
