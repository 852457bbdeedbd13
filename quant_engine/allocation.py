"""Bits and groups of single layers under a budget: bytes go where they lower the model's divergence most.

How much a layer's error matters is measured: each layer in turn is quantized alone while a text is scored, which the
model writes itself unless one is given. Divergence grows with the squared error, which is measured too, for each
width and each size of groups, so one such probe a layer tells what every choice costs.
"""

import heapq
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Self, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from numpy.typing import NDArray

from quant_engine import blueprint
from quant_engine import mlx_lm_adapter as adapter
from quant_engine.blueprint import packed_bytes
from quant_engine.config import WEIGHT_BITS, QuantConfig
from quant_engine.errors import RecipeError
from quant_engine.folded_parameters import parameters_of
from quant_engine.loader import load_source, load_tokenizer
from quant_engine.manifest import ModuleEntry
from quant_engine.perplexity import windows
from quant_engine.progress import Progress, silent
from quant_engine.quantizer import dequantize_weight, fitting_groups, quantize_weight
from quant_engine.score import logits_array, score
from quant_engine.source import Source
from quant_engine.text import Text
from quant_engine.variants import Recipe, layers_of, quantize_layer, weight_of

PROBE_BITS = 3
WINDOWS, WINDOW_TOKENS = 8, 128
"""How much text is scored."""

SAMPLE_WEIGHTS = 2**18
"""Weights of a layer whose errors are measured, in rows spread evenly over it."""


TINY = 1e-30
LEAST_KL = 1e-9
"""Nats a token that a layer costs at least, so that rounding does not make a layer look free."""


@dataclass(frozen=True)
class Choice:
    """A form of one layer, and the mean divergence, in nats a token, that it is expected to cost."""

    form: ModuleEntry
    kl: float

    @property
    def nbytes(self) -> int:
        """Bytes that it takes on disk."""
        return packed_bytes(self.form)


@dataclass(frozen=True)
class Budget:
    """The layers of a conversion: `free` ones, to choose for, and what all others that are quantized take.

    weights: of both, in all.
    """

    free: Mapping[str, ModuleEntry]
    fixed_bytes: int
    weights: int

    @classmethod
    def of(cls, source: Source, config: QuantConfig, keep_unfitting: bool = False) -> Self:
        """Free are the layers whose width follows from `config.bits` alone. Raises RecipeError where there is none."""
        found = parameters_of(source.config, source.tensors, config)
        drawn, other = (
            blueprint.draw(source.config, found, replace(config, bits=bits), keep_unfitting=keep_unfitting)
            for bits in WEIGHT_BITS[:2]
        )
        free = {path: entry for path, entry in drawn.modules.items() if other.modules[path].bits != entry.bits}
        if not free:
            raise RecipeError(
                "target_bpw finds no layer to choose a width for: none is quantized, or all have a width of their own; "
                "leave target_bpw out, or give fewer layers a width"
            )
        return cls(free, drawn.quantized_bytes - sum(map(packed_bytes, free.values())), drawn.quantized_parameters)

    def left(self, target_bpw: float, forms: Iterable[Sequence[ModuleEntry]]) -> int:
        """Bytes for the free layers, given their forms. Raises RecipeError where these take more or less."""
        sizes = [[packed_bytes(form) for form in each] for each in forms]
        least, most = (8 * (self.fixed_bytes + sum(map(end, sizes))) / self.weights for end in (min, max))
        if not least <= target_bpw <= most:
            raise RecipeError(
                f"target_bpw is {target_bpw}; the layers of this recipe take {math.ceil(1000 * least) / 1000} to "
                f"{math.floor(1000 * most) / 1000} bits a weight, scales included: choose a target between them"
            )
        return math.floor(target_bpw * self.weights / 8) - self.fixed_bytes


def allocate(
    source: Source,
    config: QuantConfig,
    target_bpw: float,
    *,
    keep_unfitting: bool = False,
    text: Text | None = None,
    progress: Progress = silent,
) -> QuantConfig:
    """The recipe `config` with bits and groups for each layer, so that they average at most target_bpw bits a weight.

    target_bpw counts all that `bits_per_weight` of a conversion does. text: to measure on instead of the model's own
    writing. Layers that have bits or groups of their own in `config` keep them. The model is loaded in full precision,
    not folded, and run. Raises RecipeError for a target that no choice reaches, InputError for a text that is too
    short.
    """
    budget = Budget.of(source, config, keep_unfitting)
    forms = {path: forms_of(path, entry, config) for path, entry in budget.free.items()}
    left = budget.left(target_bpw, forms.values())
    tokens = None
    if text is not None:
        tokens = windows(load_tokenizer(source), text, WINDOW_TOKENS, WINDOWS, own_length=False)
    model = load_source(source, fuse=False, dequantize=True)
    choices = measure(model, forms, write_text(model) if tokens is None else tokens, config, progress)
    chosen = spend(choices, left).items()
    bits = [(path, c.form.bits) for path, c in chosen if c.form.bits != config.bits]
    groups = [(path, c.form.group_size) for path, c in chosen if c.form.group_size != budget.free[path].group_size]
    return replace(config, bits_for=(*config.bits_for, *bits), groups_for=(*config.groups_for, *groups))


def forms_of(path: str, entry: ModuleEntry, config: QuantConfig) -> list[ModuleEntry]:
    """What a free layer may become: every width with every size of groups that fits, or with its own where it has one.

    One scale a row is a choice only where the recipe says so.
    """
    wished = any(fnmatchcase(path, pattern) for pattern, _ in config.groups_for)
    groups = [g for g in fitting_groups(entry.shape[-1]) if g == entry.group_size or (g and not wished)]
    return [replace(entry, bits=bits, group_size=group) for bits in WEIGHT_BITS for group in groups]


def spend(choices: Mapping[str, Sequence[Choice]], nbytes: int) -> dict[str, Choice]:
    """One choice for each layer, together at most nbytes, with the least total divergence.

    All layers begin with the fewest bytes; the next step is the one, of all layers', that saves most divergence a byte
    and fits. This is the optimum but for what the last bytes are too few for.
    """
    chosen = {path: min(each, key=lambda c: (c.nbytes, c.kl)) for path, each in choices.items()}
    left = nbytes - sum(choice.nbytes for choice in chosen.values())
    queue: list[tuple[float, str, int]] = []

    def offer(path: str) -> None:
        now = chosen[path]
        steps = [
            ((c.kl - now.kl) / (c.nbytes - now.nbytes), path, index)
            for index, c in enumerate(choices[path])
            if 0 < c.nbytes - now.nbytes <= left and c.kl < now.kl
        ]
        if steps:
            heapq.heappush(queue, min(steps))

    for path in choices:
        offer(path)
    while queue:
        _, path, index = heapq.heappop(queue)
        step = choices[path][index]
        if step.nbytes - chosen[path].nbytes <= left:
            left -= step.nbytes - chosen[path].nbytes
            chosen[path] = step
        offer(path)
    return chosen


def measure(
    model: nn.Module,
    forms: Mapping[str, Sequence[ModuleEntry]],
    tokens: NDArray[np.int32],
    config: QuantConfig,
    progress: Progress = silent,
) -> dict[str, list[Choice]]:
    """What each form of each layer costs on windows (n, tokens) of text; the model is left as it was."""
    layers, expected = layers_of(model), _logits(model, tokens)
    method = "turboquant+qjl" if config.use_qjl else "turboquant"
    choices: dict[str, list[Choice]] = {}
    for number, (path, each) in enumerate(forms.items(), 1):
        layer, probe = layers[path], replace(config, bits=PROBE_BITS, group_size=each[0].group_size)
        adapter.replace_modules(model, {path: quantize_layer(layer, Recipe(method, probe))})
        scored = score(_logits(model, tokens), expected.argmax(-1), expected)
        adapter.replace_modules(model, {path: layer})
        assert scored.kl is not None
        errors = [relative_error(weight_of(layer), config, form) for form in each]
        probed = next(e for e, form in zip(errors, each, strict=True) if form.bits == PROBE_BITS)
        kl = max(scored.kl / scored.positions, LEAST_KL)
        choices[path] = [Choice(form, kl * e / probed if probed else 0.0) for form, e in zip(each, errors, strict=True)]
        progress(number, len(forms), f"measuring what {path} bears")
    return choices


def relative_error(weight: mx.array, config: QuantConfig, form: ModuleEntry) -> float:
    """The squared error of a weight (..., out, in) in a form, relative to its square; on SAMPLE_WEIGHTS of it at most.

    0 for a weight of zeros.
    """
    rows = weight.reshape(-1, weight.shape[-1])
    rows = rows[:: max(1, -(-rows.size // SAMPLE_WEIGHTS))].astype(mx.float32)
    coded = quantize_weight(rows, replace(config, group_size=form.group_size), form.bits)
    error, square = (mx.square(values).sum() for values in (rows - dequantize_weight(coded), rows))
    return cast(float, (error / mx.maximum(square, TINY)).item())


def write_text(model: nn.Module, seed: int = 0) -> NDArray[np.int32]:
    """Windows (WINDOWS, WINDOW_TOKENS) of tokens that the model samples, each from another first token."""
    forward = cast(Callable[..., mx.array], model)
    cache = make_prompt_cache(model)
    key = mx.random.key(seed)
    vocabulary = forward(mx.zeros((1, 1), mx.int32)).shape[-1]
    written = [mx.random.randint(0, vocabulary, (WINDOWS, 1), key=key)]
    for _ in range(WINDOW_TOKENS - 1):
        key, now = mx.random.split(key)
        logits = forward(written[-1], cache=cache)[:, -1].astype(mx.float32)
        written.append(mx.random.categorical(logits, key=now)[:, None])
        mx.eval(written[-1])
    return np.array(mx.concatenate(written, axis=1), np.int32)


def _logits(model: nn.Module, windows: NDArray[np.int32]) -> NDArray[np.float32]:
    forward = cast(Callable[..., mx.array], model)
    found = [logits_array(forward(mx.array(window)[None])[0]) for window in windows]
    return np.concatenate(found)
