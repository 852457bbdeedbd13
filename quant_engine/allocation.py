"""Widths of single layers under a budget: bits go where they lower the model's divergence most.

How much a layer's error matters is measured, without data: the model writes text of its own, and each layer in turn is
quantized alone while that text is scored. Divergence grows with the square of the error, so the other widths follow
from the codes' distortions (arXiv 2504.19874, theorem 1, with searched scales).
"""

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from numpy.typing import NDArray

from quant_engine import mlx_lm_adapter as adapter
from quant_engine.config import WEIGHT_BITS, QuantConfig
from quant_engine.errors import RecipeError
from quant_engine.loader import load_source
from quant_engine.policy import Policy
from quant_engine.progress import Progress, silent
from quant_engine.score import logits_array, score
from quant_engine.source import Source
from quant_engine.variants import FloatModel, Recipe, quantize_layer, weight_of

DISTORTION = {2: 0.1111, 3: 0.0293, 4: 0.0070}
"""Squared error of a unit Gaussian weight in groups of 64 with searched scales, by bits."""

PROBE_BITS = 3
WINDOWS, WINDOW_TOKENS = 8, 128
"""How much text the model writes for itself."""


@dataclass(frozen=True)
class LayerCost:
    """A layer's weights and the mean divergence, in nats a token, that quantizing it alone to PROBE_BITS costs."""

    weights: int
    kl: float

    def at(self, bits: int) -> float:
        """The divergence expected at another width."""
        return self.kl * DISTORTION[bits] / DISTORTION[PROBE_BITS]


def allocate(
    source: Source,
    config: QuantConfig,
    target_bpw: float,
    *,
    text: NDArray[np.int32] | None = None,
    progress: Progress = silent,
) -> QuantConfig:
    """The recipe `config` with widths for each layer, so that they average at most target_bpw bits a weight.

    target_bpw counts scales, as `bits_per_weight` of a conversion does. text: windows (n, tokens) to measure on instead
    of the model's own writing. Layers with a width of their own in `config` keep it. The float model is loaded and run.
    Raises RecipeError for a target that no width reaches.
    """
    model = load_source(source, fuse=False)
    policy = Policy(config, str(source.config["model_type"]), adapter.layer_count(model))
    full = FloatModel(model, source.size_bytes, policy)
    layers = dict(full.variant().modules)
    overhead = 16 / config.group_size if config.group_size else 0.0
    _check_target(target_bpw, overhead)
    windows = write_text(model) if text is None else text
    costs = measure(model, layers, windows, replace(config, bits=PROBE_BITS), progress)
    widths = spend(costs, target_bpw - overhead)
    return replace(config, bits_for=(*config.bits_for, *widths.items()))


def spend(costs: Mapping[str, LayerCost], bits_per_weight: float) -> dict[str, int]:
    """Bits of each layer, averaging at most bits_per_weight codes' bits, with the least total divergence.

    All layers begin at the least width; the next bit goes where it saves most divergence a bit. Savings shrink from
    width to width, so this is the optimum but for the last layer that no longer fits.
    """
    widths = dict.fromkeys(costs, WEIGHT_BITS[0])
    left = (bits_per_weight - WEIGHT_BITS[0]) * sum(cost.weights for cost in costs.values())
    queue: list[tuple[float, str]] = []

    def offer(path: str) -> None:
        bits, cost = widths[path], costs[path]
        if bits < WEIGHT_BITS[-1]:
            heapq.heappush(queue, (-(cost.at(bits) - cost.at(bits + 1)) / cost.weights, path))

    for path in costs:
        offer(path)
    while queue:
        _, path = heapq.heappop(queue)
        if costs[path].weights <= left:
            left -= costs[path].weights
            widths[path] += 1
            offer(path)
    return widths


def measure(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    windows: NDArray[np.int32],
    config: QuantConfig,
    progress: Progress = silent,
) -> dict[str, LayerCost]:
    """What quantizing each layer alone costs on windows (n, tokens) of text; the model is left as it was."""
    expected = _logits(model, windows)
    costs: dict[str, LayerCost] = {}
    for number, (path, layer) in enumerate(layers.items(), 1):
        adapter.replace_modules(model, {path: quantize_layer(layer, Recipe("turboquant", config))})
        found = _logits(model, windows)
        adapter.replace_modules(model, {path: layer})
        scored = score(found, expected.argmax(-1), expected)
        assert scored.kl is not None
        costs[path] = LayerCost(weight_of(layer).size, max(scored.kl / scored.positions, 1e-9))
        progress(number, len(layers), f"measuring what {path} bears")
    return costs


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


def _check_target(target_bpw: float, overhead: float) -> None:
    least, most = WEIGHT_BITS[0] + overhead, WEIGHT_BITS[-1] + overhead
    if not least <= target_bpw <= most:
        raise RecipeError(
            f"target_bpw is {target_bpw}; with this group size layers take {least} to {most} bits a weight, scales "
            "included: choose a target between them"
        )
