"""All that this project knows of mlx-lm's insides: its models' modules, attention call and loading."""

import importlib
import re
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType
from typing import Any, Protocol, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import activations, base, llama, qwen2, qwen3
from mlx_lm.models.rope_utils import YarnRoPE
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.utils import _get_classes, dequantize_model, load_model, load_tokenizer  # pyright: ignore[reportPrivateUsage]

import metal_kernels
from quant_engine.errors import CorruptCheckpointError, UnsupportedModelError
from quant_engine.mlx_lm_config import readable
from quant_engine.rebinding import rebound, rebound_class
from quant_engine.tokenizer_files import require_tokenizer
from quant_engine.yarn import frequencies

SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of sibling layers that read the same input, in the models mlx-lm has."""

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""Settings of every model that none has at zero."""


Weights = dict[str, mx.array]

_ONE_EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.((?:gate|up|down)_proj\.\w+)")


class Attends(Protocol):
    """A cache that computes attention on what it holds."""

    def add(self, keys: mx.array, values: mx.array) -> None:
        """Add new tokens' keys and values (batch, KV heads, length, size)."""
        ...

    def attend(self, queries: mx.array, *, scale: float, mask: Any, sinks: mx.array | None = None) -> mx.array:
        """Attention of queries (batch, heads, length, size) over the cache."""
        ...


def supports(config: Mapping[str, Any]) -> bool:
    """Whether mlx-lm has a model for this config's `model_type`."""
    try:
        _get_classes(config=dict(config))
    except (ValueError, KeyError):
        return False
    return True


def load_float(path: Path, config: Mapping[str, Any]) -> nn.Module:
    """mlx-lm's model of a folder in the precision of its file, weights not read yet. Raises as `build` does."""
    known = readable(config)
    with _explained(known):
        model, _ = load_model(path, lazy=True, model_config=known, get_model_classes=_stacking_classes)
    del model.sanitize  # that of its class stays; ours refers back to the model, which would keep its memory
    _exact_yarn(model, known)
    return model


def build(config: Mapping[str, Any]) -> nn.Module:
    """mlx-lm's model of a config, with weights yet to be set.

    Raises UnsupportedModelError where it has none, CorruptCheckpointError where the config does not describe one.
    """
    known = readable(config)
    model = _new(known)
    model.eval()
    _tie(model, known)
    _exact_yarn(model, known)
    return model


@contextmanager
def _explained(config: Mapping[str, Any]) -> Generator[None]:
    """Turn what mlx-lm raises for a config that it cannot use into errors that tell what to do."""
    model_type = config.get("model_type")
    if not supports(config):
        raise UnsupportedModelError(
            f"model_type {model_type!r} is none that mlx-lm has a model for, so it can be neither "
            "converted nor run; give a language model in safetensors, or update mlx-lm"
        )
    try:
        yield
    except (TypeError, LookupError, ValueError, AttributeError, ArithmeticError, AssertionError) as error:
        zero = [f"{key} 0" for key, value in config.items() if value == 0 and key in _SIZES]
        lacking = f"it lacks {error}" if isinstance(error, KeyError) else ""
        reason = ", ".join(zero) or lacking or str(error) or type(error).__name__
        raise CorruptCheckpointError(
            f"config.json does not describe a {model_type} model as mlx-lm has it: {reason}; download it again, or, if "
            "it is whole, update mlx-lm"
        ) from error


def _new(known: Mapping[str, Any]) -> nn.Module:
    with _explained(known):
        model_class, args_class = _get_classes(config=dict(known))
        return cast(nn.Module, model_class(args_class.from_dict(known)))


def _stacking_classes(config: dict[str, Any]) -> tuple[Any, Any]:
    """As mlx-lm's function of this kind: what makes the model, here one whose `sanitize` stacks experts too."""
    model_class, args_class = _get_classes(config=config)

    def make(args: Any) -> nn.Module:
        model: Any = model_class(args)
        own = _sanitizer(model)

        def sanitize(weights: Weights) -> Weights:
            return _stacked(own(weights))

        model.sanitize = sanitize
        return model

    return make, args_class


def _sanitizer(model: nn.Module) -> Callable[[Weights], Weights]:
    """A model's `sanitize`, or what leaves weights as they are."""

    def unchanged(weights: Weights) -> Weights:
        return weights

    return cast(Any, getattr(model, "sanitize", unchanged))


def _tie(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Take the output projection from a model of tied embeddings whose class waits for the weights' names to do so."""
    inner = cast(nn.Module, getattr(model, "language_model", model))
    text = cast(Mapping[str, Any], config.get("text_config") or {})
    sanitize = vars(type(inner)).get("sanitize")
    decides = "lm_head" in inner and isinstance(sanitize, FunctionType) and "lm_head" in sanitize.__code__.co_consts
    if decides and config.get("tie_word_embeddings", text.get("tie_word_embeddings", True)):
        cast(Any, inner).sanitize({})


def _exact_yarn(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Honour `truncate: false` of YaRN, as gpt-oss has it: mlx-lm rounds the ends of the ramp all the same."""
    rope = cast(dict[str, Any], config.get("rope_scaling") or {})
    if rope.get("truncate", True):
        return
    for module in linear_modules(model, (YarnRoPE,)).values():
        yarn = cast(Any, module)
        yarn._freqs = frequencies(yarn.dims, rope, config["rope_theta"])


def sanitize(config: Mapping[str, Any], weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """A checkpoint's tensors as the parameters of mlx-lm's model of a config; lazy, as far as the arrays are."""
    return _stacked(_sanitizer(_new(readable(config)))(dict(weights)))


def _stacked(weights: Weights) -> Weights:
    """Weights in which experts that mlx-lm left one by one are those of one module for all."""
    experts: dict[str, dict[int, mx.array]] = {}
    for name in list(weights):
        if found := _ONE_EXPERT.fullmatch(name):
            path, number, part = found.groups()
            experts.setdefault(f"{path}.switch_mlp.{part}", {})[int(number)] = weights.pop(name)
    return weights | {name: mx.stack([each[e] for e in sorted(each)]) for name, each in experts.items()}


def may_cast(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """Whether a parameter of mlx-lm's model of a config may change its float dtype: some are kept in float32."""

    def always(_: str) -> bool:
        return True

    return cast(Callable[[str], bool], getattr(build(config), "cast_predicate", always))


def set_parameters(model: nn.Module, named: Mapping[str, mx.array]) -> None:
    """Set all parameters that `model` still has, by the names they have there.

    Raises UnsupportedModelError where names do not match.
    """
    expected = {name for name, _ in tree_flatten(model.parameters())}
    wrong = [f"missing {n}" for n in sorted(expected - set(named))] + [
        f"unexpected {n}" for n in sorted(set(named) - expected)
    ]
    if wrong:
        raise UnsupportedModelError(
            f"the weights do not fit mlx-lm's {type(model).__module__}: {', '.join(wrong[:6])}"
            f"{' and more' if len(wrong) > 6 else ''}; update mlx-lm, or convert again"
        )
    model.load_weights(list(named.items()))


def tokenizer(path: Path, eos_token_ids: Any = None, settings: Mapping[str, Any] | None = None) -> Any:
    """mlx-lm's tokenizer wrapper of a folder; settings replace those of the folder, `chat_template` for one.

    Raises SourceError where there is none, CorruptCheckpointError where it cannot be read.
    """
    require_tokenizer(path)
    try:
        return load_tokenizer(path, dict(settings or {}), eos_token_ids=eos_token_ids)
    except Exception as error:  # whatever a broken file makes transformers raise
        raise CorruptCheckpointError(f"the tokenizer of {path} cannot be read: {error!r}; download it anew") from error


def linear_modules(model: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.Linear,)) -> dict[str, nn.Module]:
    """Modules of exactly these kinds, since a subclass may use its weight otherwise, by path in the model's order."""
    named = cast(list[tuple[str, nn.Module]], model.named_modules())
    return {path: module for path, module in reversed(named) if type(module) in kinds}


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of mixtures of experts, one module for all experts, by their dotted path."""
    return linear_modules(model, (SwitchLinear,))


def quantize_as_stored(model: nn.Module, tensors: Mapping[str, mx.array]) -> None:
    """Make modules those of MLX's affine quantization where `tensors` hold them so, as their shapes tell.

    Raises CorruptCheckpointError for shapes that no affine quantization has.
    """

    def stated(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized") or f"{path}.biases" not in tensors:
            return False
        width = cast(mx.array, module["weight"]).shape[-1]
        words, groups = tensors[f"{path}.weight"].shape[-1], tensors[f"{path}.scales"].shape[-1]
        if words * 32 % width or not groups or width % groups:
            raise CorruptCheckpointError(
                f"layer {path} has {words} words and {groups} scales for {width} values, which is no quantization of "
                "MLX; download the model again, whole"
            )
        return {"bits": words * 32 // width, "group_size": width // groups}

    nn.quantize(model, class_predicate=stated)


def dequantize(model: nn.Module) -> None:
    """Put float modules in the place of those that MLX quantized."""
    dequantize_model(model)


def match_norms(model: nn.Module, dtype: mx.Dtype) -> None:
    """Give weights of norms the precision of the activations, which would otherwise be raised to theirs."""
    for norm in cast(list[nn.Module], model.modules()):
        if isinstance(norm, nn.RMSNorm | nn.LayerNorm):
            norm.update({"weight": cast(mx.array, norm["weight"]).astype(dtype)})


PLAIN_LAYERS = (llama.TransformerBlock, qwen2.TransformerBlock, qwen3.TransformerBlock)
"""Layers of mlx-lm that are attention and a feed-forward layer, each after a norm and added, and nothing else."""

PLAIN_MODELS = (llama.LlamaModel, qwen2.Qwen2Model, qwen3.Qwen3Model)
"""Models of mlx-lm that are embeddings, such layers one after another, and a norm."""

FEED_FORWARD = {"gate_proj", "up_proj", "down_proj", "swiglu"}
"""All names that the call of a gated feed-forward layer uses, in the models mlx-lm has."""


def feed_forwards(model: nn.Module) -> dict[str, nn.Module]:
    """Gated feed-forward layers, which do nothing but down(swiglu(gate(x), up(x))), by path."""
    named = cast(list[tuple[str, nn.Module]], model.named_modules())
    return {path: module for path, module in named if _names(module) == FEED_FORWARD}


def _names(module: nn.Module) -> set[str]:
    call = vars(type(module)).get("__call__")
    return set(call.__code__.co_names) if isinstance(call, FunctionType) else set()


def layer_count(model: nn.Module) -> int:
    """Layers of the model; 0 where it does not tell them."""
    return len(getattr(model, "layers", ()))


def bias_of(module: nn.Module) -> mx.array | None:
    """A linear layer's bias, None where it has none."""
    return cast(mx.array, module["bias"]) if "bias" in module else None


def replace_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put modules in the place of those at the given dotted paths."""
    model.update_modules(cast(dict[str, Any], tree_unflatten(list(modules.items()))))


def shared_inputs(paths: Iterable[str]) -> list[tuple[str, ...]]:
    """Groups of paths whose layers read the same input, each in a fixed order; paths in no group are left out."""
    present = set(paths)
    parents = dict.fromkeys(path.rpartition(".")[0] for path in paths)
    candidates = [tuple(f"{parent}.{name}" for name in names) for parent in parents for names in SHARED_INPUTS]
    return [group for group in candidates if present.issuperset(group)]


def backbone(model: nn.Module) -> Callable[..., mx.array] | None:
    """The part of the model before its output projection, called as (tokens, cache=...); None where unknown."""
    inner = getattr(getattr(model, "language_model", model), "model", None)
    return cast(Callable[..., mx.array], inner) if isinstance(inner, nn.Module) else None


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: Any,
    sinks: mx.array | None = None,
) -> mx.array:
    """Attention as mlx-lm's models call it: by the cache itself where it can, by this project's kernels otherwise."""
    if hasattr(cache, "attend"):
        return cast(Attends, cache).attend(queries, scale=scale, mask=mask, sinks=sinks)
    if hasattr(cache, "bits"):
        return base.scaled_dot_product_attention(queries, keys, values, cache, scale, mask, sinks)
    return metal_kernels.attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)


def attention_of_new(
    queries: mx.array, keys: mx.array, values: mx.array, cache: Any, scale: float, mask: Any
) -> mx.array:
    """Attention as a layer calls it, after new keys and values (B, KV heads, L, size) joined a cache there is."""
    if hasattr(cache, "attend"):
        own = cast(Attends, cache)
        own.add(keys, values)
        return own.attend(queries, scale=scale, mask=mask)
    if cache is not None:
        keys, values = cache.update_and_fetch(keys, values)
    return attention(queries, keys, values, cache, scale, mask)


ROUTES: Mapping[str, tuple[Any, Any]] = {
    "scaled_dot_product_attention": (base.scaled_dot_product_attention, attention),
    "swiglu": (activations.swiglu, metal_kernels.swiglu),
}
"""Global names that mlx-lm's models call, the function each has there, and this project's for it."""


def route(model: nn.Module) -> int:
    """Make this model's own modules call this project's attention and activation for mlx-lm's (see ROUTES).

    Each module that names one of them gets a subclass whose methods see ours under that name; other models in the
    process keep theirs. Returns how many modules were changed.
    """
    routed: dict[type, type] = {}
    changed = 0
    for module in cast(list[nn.Module], model.modules()):
        kind = type(module)
        if kind not in routed:
            routed[kind] = rebound_class(kind, ROUTES)
        if routed[kind] is not kind:
            module.__class__ = routed[kind]
            changed += 1
    return changed


class Opens(Protocol):
    """What opens a model by name: mlx-lm's model, its tokenizer with these settings, and its config."""

    def __call__(self, model: str, settings: Mapping[str, Any]) -> tuple[Any, Any, dict[str, Any]]: ...


def run_program(program: str, arguments: Sequence[str], open_model: Opens) -> None:
    """Run mlx-lm's own `generate`, `chat` or `server` with these command-line arguments, on models from `open_model`.

    mlx-lm has no place to register a loader, so its `main` runs as a copy in which the name `load`, there and in the
    classes that it makes, means `open_model`; mlx-lm itself is not changed. Raises UnsupportedModelError for adapters
    and quantized activations, which these models have not.
    """

    def load(
        model: str,
        tokenizer_config: Mapping[str, Any] | None = None,
        model_config: Mapping[str, Any] | None = None,
        adapter_path: str | None = None,
        return_config: bool = False,
        trust_remote_code: bool = False,
    ) -> tuple[Any, ...]:
        if adapter_path or (model_config or {}).get("quantize_activations"):
            raise UnsupportedModelError(
                f"tq-mcp opens {model} and takes no adapters and quantizes no activations; leave --adapter-path and "
                "--quantize-activations out, or export the model (tq-mcp export) and use mlx-lm alone"
            )
        settings = {key: value for key, value in (tokenizer_config or {}).items() if key != "trust_remote_code"}
        opened = open_model(model, settings)
        return opened if return_config else opened[:2]

    module = importlib.import_module(f"mlx_lm.{program}")
    main = cast(FunctionType, module.main)
    named = {name: vars(module).get(name) for name in main.__code__.co_names}
    replaced: dict[str, Any] = {"load": load}
    for name, kind in named.items():
        if isinstance(kind, type):
            replaced[name] = rebound_class(kind, {"load": (module.load, load)})
    before, sys.argv = sys.argv, [f"mlx_lm.{program}", *arguments]
    try:
        rebound(main, replaced)()
    finally:
        sys.argv = before
