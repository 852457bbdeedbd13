"""What is quantized at what width, and why the rest is kept as it came."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from quant_engine.architecture import Architecture
from quant_engine.config import QuantConfig
from quant_engine.errors import RecipeError
from quant_engine.quantizer import check_width
from quant_engine.rotation import choose_block

WHOLE = 16
"""Bits that stand for a module left as it came."""

EMBEDDINGS = ("embed_tokens", "wte", "embeddings", "word_embeddings", "tok_embeddings")
HEADS = ("lm_head", "output", "embed_out")
ROUTERS = ("gate", "router", "shared_expert_gate")
SMALLEST = 16
"""Rows and columns of a matrix that is worth quantizing, or kernels of our own."""
STATE_SPACE = ("in_proj_a", "in_proj_b", "in_proj_ba", "dt_proj", "x_proj")
ATTENTION = ("self_attn", "attention", "attn", "linear_attn", "mixer")
FULL_ATTENTION = {"gpt_oss": "attention, which gpt-oss keeps in full precision too"}
"""Architectures whose own quantized release leaves attention whole."""


@dataclass(frozen=True)
class Decision:
    """Whether a module's weight is quantized, at how many bits (0: not), and the reason where it is not.

    fits: False where the recipe would quantize it, and its groups or rotation do not fit the width.
    """

    quantize: bool
    bits: int = 0
    reason: str = ""
    fits: bool = True


@dataclass(frozen=True)
class Policy:
    """A recipe applied to a model of `model_type` with so many `layers`."""

    config: QuantConfig
    model_type: str = ""
    layers: int = 0

    def decide(self, path: str, shape: tuple[int, ...], *, keep_unfitting: bool = False) -> Decision:
        """What becomes of the module at `path` whose weight has `shape`: (out, in), (experts, out, in) for experts.

        Raises RecipeError, naming module and what fits, where the recipe's groups or rotation do not fit its
        width; with keep_unfitting such a module is kept in full precision instead.
        """
        bits, reason = self._width(path, shape)
        if bits == WHOLE:
            return Decision(False, reason=reason)
        try:
            check_width(shape[-1], self.group_size(path))
            choose_block(shape[-1], self.config.rotation)
        except RecipeError as error:
            if keep_unfitting:
                return Decision(False, reason=str(error), fits=False)
            raise RecipeError(
                f"{path}: {error}; to convert the rest, keep such modules in full precision (keep_unfitting)"
            ) from error
        return Decision(True, bits)

    def group_size(self, path: str) -> int:
        """Weights that share a scale in the module at `path`, where it is quantized; 0: one scale a row."""
        return _last_wish(self.config.groups_for, path, self.config.group_size)

    def _width(self, path: str, shape: tuple[int, ...]) -> tuple[int, str]:
        """Bits, and why where they are WHOLE. What cannot be quantized comes first, then the most special wish."""
        config = self.config
        if reason := _structure(path, shape):
            return WHOLE, reason
        if any(fnmatchcase(path, pattern) for pattern in config.skip):
            return WHOLE, "skipped on request"
        if bits := _last_wish(config.bits_for, path, 0):
            return bits, "left whole on request"
        if self._protected(path):
            return WHOLE, f"one of the {config.protect_layers} layers at each end, protected on request"
        return self._class_width(path, experts=len(shape) == 3)

    def _class_width(self, path: str, experts: bool) -> tuple[int, str]:
        config, parts = self.config, path.split(".")
        if parts[-1] in EMBEDDINGS:
            return config.embed_bits or WHOLE, "embeddings"
        if parts[-1] in HEADS and len(parts) <= 2:
            return config.head_bits or WHOLE, "output projection"
        if experts:
            down = config.expert_down_bits if parts[-1] == "down_proj" else None
            return down or config.expert_bits or config.bits, "experts, on request"
        if any(part in ATTENTION for part in parts):
            usual = WHOLE if self.model_type in FULL_ATTENTION else config.bits
            return config.attn_bits or usual, FULL_ATTENTION.get(self.model_type, "attention, on request")
        return config.mlp_bits or config.bits, "feed-forward, on request"

    def _protected(self, path: str) -> bool:
        found = re.search(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.", path)
        ends = self.config.protect_layers
        return bool(found and ends and not ends <= int(found[1]) < self.layers - ends)


def check_wishes(config: QuantConfig, model: Architecture) -> None:
    """Raise RecipeError for a pattern that matches no layer of a model, and for experts' widths where it has none."""
    layers = [*model.linear, *model.experts, *model.embeddings]
    for name in ("skip", "bits_for", "groups_for"):
        for wish in getattr(config, name):
            pattern = wish if isinstance(wish, str) else wish[0]
            if not any(fnmatchcase(path, pattern) for path in layers):
                raise RecipeError(
                    f"{name} has the pattern {pattern!r}, which matches no layer of the model; there are "
                    f"{', '.join(_one_of_each(layers))}, and so on: correct the pattern, or leave it out"
                )
    for name in ("expert_bits", "expert_down_bits"):
        if getattr(config, name) and not model.experts:
            raise RecipeError(
                f"{name} is {getattr(config, name)} and the model has no experts; leave it out (mlp_bits is for "
                "feed-forward layers)"
            )


def check_effect(config: QuantConfig, quantized: Collection[str], excluded: Mapping[str, str]) -> None:
    """Raise RecipeError where a recipe quantizes no module of a model; excluded: why each is kept."""
    if quantized:
        return
    wishes = {name: value for name, value in config.to_dict().items() if _leaves_whole(name, value)}
    said = " and ".join(f"{name} = {value}" for name, value in wishes.items())
    reasons = "; ".join(list(dict.fromkeys(excluded.values()))[:6])
    advice = f"change {' or '.join(wishes)}" if wishes else "choose a group_size that fits"
    raise RecipeError(
        f"nothing is left to quantize with {said or 'this recipe'}: all modules are kept as they came ({reasons}); "
        f"{advice}, or use the model as it is, without converting it"
    )


def _leaves_whole(name: str, value: Any) -> bool:
    """Whether a setting of a recipe leaves modules as they came."""
    if name == "bits_for":
        return any(bits == WHOLE for _, bits in value)
    return bool(value) if name in ("skip", "protect_layers") else name.endswith("_bits") and value == WHOLE


def _one_of_each(paths: Iterable[str]) -> list[str]:
    """The first path that ends in each name, as examples."""
    return list({path.rpartition(".")[2]: path for path in reversed(list(paths))}.values())[::-1]


def _last_wish(wishes: tuple[tuple[str, int], ...], path: str, usual: int) -> int:
    """What the last pattern that matches a module says; `usual` where none does."""
    return next((value for pattern, value in reversed(wishes) if fnmatchcase(path, pattern)), usual)


def _structure(path: str, shape: tuple[int, ...]) -> str:
    """Why a module is never quantized; "" for those that may be."""
    parts = path.split(".")
    name = parts[-1]
    if name in ROUTERS:
        return "router"
    if name in STATE_SPACE:
        return "state-space parameters"
    if "norm" in name:
        return "norm"
    if "conv" in name:
        return "convolution"
    if len(shape) not in (2, 3):
        return "not a matrix"
    return f"fewer than {SMALLEST} rows or columns" if min(shape[-2:]) < SMALLEST else ""
