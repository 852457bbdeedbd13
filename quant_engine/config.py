"""The two recipes: how weights are quantized, and how a key-value cache is."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self, cast

from quant_engine.errors import RecipeError

WEIGHT_BITS = (2, 3, 4)
MODULE_BITS = (*WEIGHT_BITS, 16)
"""Widths that single modules can be given; 16 leaves them as they came."""
CACHE_BITS = (2, 3, 4, 8)
GROUP_SIZES = (0, 32, 64, 128)
ROTATIONS = ("auto", "hadamard", "blockwise_hadamard", "none")
SCALES = ("search", "rms")
CODES = ("lloyd_max",)


class _Recipe:
    """Conversion to and from plain JSON values, shared by both recipes."""

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        values = asdict(self)  # pyright: ignore[reportArgumentType, reportUnknownVariableType, reportCallIssue]
        return cast(dict[str, Any], json.loads(json.dumps(values)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The recipe with these settings, defaults for the rest; raises RecipeError for unknown names."""
        known = [field.name for field in fields(cls)]  # pyright: ignore[reportArgumentType]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise RecipeError(f"unknown setting {', '.join(unknown)}; the settings are {', '.join(known)}")
        return cls(**values)


@dataclass(frozen=True)
class QuantConfig(_Recipe):
    """How the weights of a model are quantized.

    bits: 2, 3 or 4 for each weight. group_size: weights that share a float16 scale, 32, 64 or 128 along the
    input, 0 for one scale a row. rotation: "hadamard" (whole rows), "blockwise_hadamard", "none", or "auto",
    the first that fits. scale: "search" minimises each group's squared error, "rms" takes its root mean
    square. use_qjl: one more bit a weight for an unbiased correction (see `residual`). seed: of the random
    signs. fold_rotation: fold norms and the residual stream's rotation into the weights (see `folding`), so that only
    the inputs of output and down projections are rotated at run time.

    Widths of their own, 2, 3, 4, or 16 for as it came: attn_bits, mlp_bits, expert_bits (experts' gate and up
    projections, and down unless expert_down_bits says otherwise), embed_bits and head_bits (embeddings and output
    projection, left as they came by default). skip: modules left as they came; bits_for: (pattern, bits) for modules,
    the last that matches counts; patterns as in a shell, matched against a module's path. groups_for: (pattern,
    group_size) in the same way. protect_layers: layers at each end left as they came. Raises RecipeError for values
    outside these.
    """

    bits: int = 3
    group_size: int = 64
    rotation: str = "auto"
    scale: str = "search"
    use_qjl: bool = False
    seed: int = 0
    code: str = "lloyd_max"
    attn_bits: int | None = None
    mlp_bits: int | None = None
    expert_bits: int | None = None
    expert_down_bits: int | None = None
    embed_bits: int | None = None
    head_bits: int | None = None
    skip: tuple[str, ...] = ()
    bits_for: tuple[tuple[str, int], ...] = ()
    groups_for: tuple[tuple[str, int], ...] = ()
    protect_layers: int = 0
    fold_rotation: bool = False

    def __post_init__(self) -> None:
        _check("bits", self.bits, WEIGHT_BITS)
        for name in ("attn_bits", "mlp_bits", "expert_bits", "expert_down_bits", "embed_bits", "head_bits"):
            _check(name, getattr(self, name), (None, *MODULE_BITS))
        object.__setattr__(self, "skip", tuple(self.skip))
        for name, allowed in (("bits_for", MODULE_BITS), ("groups_for", GROUP_SIZES)):
            pairs = tuple((str(pattern), value) for pattern, value in getattr(self, name))
            object.__setattr__(self, name, pairs)
            for pattern, value in pairs:
                _check(f"{name} {pattern}", value, allowed)
        _check_count("protect_layers", self.protect_layers)
        _check("group_size", self.group_size, GROUP_SIZES)
        _check("rotation", self.rotation, ROTATIONS)
        _check("scale", self.scale, SCALES)
        _check("use_qjl", self.use_qjl, (False, True))
        _check("code", self.code, CODES)
        _check("fold_rotation", self.fold_rotation, (False, True))
        if self.fold_rotation and self.rotation == "none":
            raise RecipeError(
                "fold_rotation has nothing to fold with rotation 'none'; choose rotation 'auto', or leave it off"
            )
        _check_count("seed", self.seed)


@dataclass(frozen=True)
class CacheConfig(_Recipe):
    """How keys and values are held.

    k_bits, v_bits: 2, 3, 4 or 8 for each number. group_size: numbers of one head that share a float16 scale
    (0: the whole head). sink_tokens, recent_tokens: tokens at the start and the end kept in full precision.
    boundary_layers: layers at each end of the model whose cache is kept whole. seed: of the random signs.
    Raises RecipeError for values outside these.
    """

    k_bits: int = 8
    v_bits: int = 4
    group_size: int = 64
    sink_tokens: int = 0
    recent_tokens: int = 0
    boundary_layers: int = 0
    seed: int = 0

    @property
    def title(self) -> str:
        """The widths in words, for people."""
        return f"{self.k_bits}-bit keys, {self.v_bits}-bit values"

    def __post_init__(self) -> None:
        _check("k_bits", self.k_bits, CACHE_BITS)
        _check("v_bits", self.v_bits, CACHE_BITS)
        _check("group_size", self.group_size, GROUP_SIZES)
        for name in ("sink_tokens", "recent_tokens", "boundary_layers", "seed"):
            _check_count(name, getattr(self, name))


def _check(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if not any(value == option and type(value) is type(option) for option in allowed):
        raise RecipeError(f"{name} is {value!r}; choose one of {', '.join(map(repr, allowed))}")


def _check_count(name: str, value: object) -> None:
    if type(value) is not int or not 0 <= value < 2**63:
        raise RecipeError(f"{name} is {value!r}; it must be a whole number from 0 to 2^63 - 1")
