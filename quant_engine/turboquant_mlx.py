"""Models made by turboquant-mlx (read up to its 0.30), opened as they are.

Their config.json says `"quantization": {"mode": "turboquant", ...}` and no version; each layer describes itself:

    weight     uint32 (..., out, words)  codes in order, the first lowest, whole codes to a word: 32, 16, 10 or 8 of
                                         1, 2, 3 or 4 bits; 20 digits of base 3 where the codebook has 3 values
    scales     float16 (..., out, groups)
    codebook   float16 (2^bits,) or (3,)
    signs      float16 (width,)          of its own for each layer, shared by experts
    bias       float16 (..., out)        where the layer has one

The rotation of an input is as here: signs, then the largest Hadamard blocks that divide the width. With QJL a layer
has signs (out, width / 32) and norms (out,) of its rounding errors in the rotated domain, S = one round of
`qjl_signs` and Hadamard blocks: <r, x> ~ sqrt(pi / (2 width)) * norm * <sign(S r), S x>. Embeddings and other layers
may be quantized by MLX instead ("affine_extras"); they have scales and biases and no codebook.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from metal_kernels import Experts, PackedWeight, hadamard_block, matmul, pack, rotate
from quant_engine.config import QuantConfig
from quant_engine.errors import CorruptCheckpointError, UnsupportedModelError
from quant_engine.experts import ExpertsLinear
from quant_engine.linear import TurboQuantLinear
from quant_engine.quantizer import CHUNK_VALUES

MODE = "turboquant"
ROTATIONS = ("hadamard", "blockwise_hadamard", "none")
GROUP_SIZES = (32, 64, 128)
SPECULATOR = "tq_speculator."
"""Start of the names of a head that guesses several tokens ahead; it is kept for that program and not used here."""

_BITS = {2: 1, 3: 2, 4: 2, 8: 3, 16: 4}
"""Bits of a code here, by the codebook's length there."""
_QJL = ("qjl_packed", "qjl_norms", "qjl_signs")
PARTS = ("weight", "scales", "codebook", "signs", *_QJL)
"""Names of a quantized layer's tensors but the bias."""


def block_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """turboquant-mlx's block of a config.json, None where another program made the model.

    Raises UnsupportedModelError, by name, for what is not read here: a rotation of another kind, or one that was
    fused into norms.
    """
    block: Any = config.get("quantization")
    if not isinstance(block, dict) or cast(dict[str, Any], block).get("mode") != MODE:
        return None
    stated = cast(dict[str, Any], block)
    if stated.get("rotation", "hadamard") not in ROTATIONS:
        raise _unreadable(f"its rotation is {stated['rotation']!r}; only {', '.join(ROTATIONS)} can be read")
    if stated.get("fuse_rotations"):
        raise _unreadable("fuse_rotations overwrote weights of its norms, which cannot be recovered")
    return stated


def _unreadable(why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"this model was made by turboquant-mlx in a way that is not read here: {why}. Convert the original model with "
        "tq-mcp convert"
    )


def recipe_of(config: Mapping[str, Any]) -> QuantConfig:
    """The widths and groups that a model was asked to have, by its config.json; single layers may differ."""
    block = block_of(config) or {}
    return QuantConfig(block.get("bits", 3), block.get("group_size", 64), use_qjl=block.get("use_qjl", False))


@dataclass(frozen=True)
class RotatedResidual:
    """QJL's correction in the rotated domain: the layer's own rotation (signs, block), then one-bit codes."""

    signs: mx.array | None
    block: int
    weight: PackedWeight

    @property
    def nbytes(self) -> int:
        """Bytes of signs and norms."""
        return self.weight.nbytes

    def apply(self, x: mx.array) -> mx.array:
        """Estimated products of the errors with x (..., width), not rotated: (..., out) in x's dtype."""
        return matmul(rotate(x, self.signs, self.block), self.weight)


def take_layers(
    block: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], tensors: dict[str, mx.array]
) -> dict[str, nn.Module]:
    """Remove the quantized layers from `tensors` and return them as layers of this project, by path.

    shapes: (out, in) or (experts, out, in) of the model's layers by path. Raises CorruptCheckpointError where tensors
    are missing or contradict these, UnsupportedModelError for codes and groups that cannot be read.
    """
    paths = [name.removesuffix(".codebook") for name in tensors if name.endswith(".codebook")]
    return {path: _Layer.take(path, block, shapes, tensors).module() for path in paths}


@dataclass(frozen=True)
class _Layer:
    """One layer's tensors. shape: (out, in) or (experts, out, in). signs: None where nothing is rotated."""

    path: str
    shape: tuple[int, ...]
    parts: Mapping[str, mx.array]
    signs: mx.array | None

    @classmethod
    def take(
        cls,
        path: str,
        block: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        tensors: dict[str, mx.array],
    ) -> "_Layer":
        qjl = any(f"{path}.{name}" in tensors for name in _QJL)
        names = [name for name in PARTS if qjl or name not in _QJL]
        missing = [name for name in names if f"{path}.{name}" not in tensors]
        if missing:
            raise CorruptCheckpointError(
                f"layer {path} of this turboquant-mlx model lacks {', '.join(missing)}; download the model again, whole"
            )
        if path not in shapes:
            raise _unreadable(f"layer {path} is none of mlx-lm's model of that type")
        parts = {name: tensors.pop(f"{path}.{name}") for name in names}
        if f"{path}.bias" in tensors:
            parts["bias"] = tensors.pop(f"{path}.bias")
        # Versions before 0.28 rotated whatever the config said; then the signs show it.
        rotated = block.get("rotation") != "none" or bool(mx.any(parts["signs"] < 0))
        layer = cls(path, shapes[path], parts, parts["signs"].astype(mx.float32) if rotated else None)
        layer._check()
        return layer

    @property
    def block(self) -> int:
        return hadamard_block(self.shape[-1]) if self.signs is not None else 1

    @property
    def values(self) -> int:
        """Values of the codebook."""
        return self.parts["codebook"].size

    @property
    def codebook(self) -> tuple[float, ...]:
        """Ascending, as many values as codes of these bits can name; a fourth that no ternary code names."""
        known = tuple(map(float, cast(list[float], self.parts["codebook"].tolist())))
        return known if self.values != 3 else (*known, 2 * known[2])

    def _check(self) -> None:
        *outs, width = self.shape
        if self.values not in _BITS:
            allowed = ", ".join(map(str, _BITS))
            raise _unreadable(f"layer {self.path} has a codebook of {self.values} values; only {allowed} can be read")
        for name, part in self.parts.items():
            dtype, shape = self._expected(name)
            if (part.dtype, part.shape) != (dtype, shape):
                raise CorruptCheckpointError(
                    f"tensor {self.path}.{name} is {part.dtype} {list(part.shape)} and a turboquant-mlx model of this "
                    f"config has {dtype} {list(shape)}; download the model again, whole"
                )
        groups = self.parts["scales"].shape[-1]
        if width not in [groups * size for size in GROUP_SIZES]:
            allowed = ", ".join(map(str, GROUP_SIZES))
            raise _unreadable(
                f"layer {self.path} has {groups} scales for {width} inputs; only groups of {allowed} can be read"
            )
        if len(outs) > 1 and "qjl_packed" in self.parts:
            raise _unreadable(f"layer {self.path} has QJL for experts, which is not read")

    def _expected(self, name: str) -> tuple[mx.Dtype, tuple[int, ...]]:
        """Dtype and shape of a part, the number of groups taken from the scales as they are."""
        *outs, width = self.shape
        per_word = 20 if self.values == 3 else 32 // _BITS[self.values]
        shapes: dict[str, tuple[int, ...]] = {
            "weight": (*outs, -(-width // per_word)),
            "scales": (*outs, *self.parts["scales"].shape[-1:]),
            "codebook": (self.values,),
            "signs": (width,),
            "bias": tuple(outs),
            "qjl_packed": (*outs, -(-width // 32)),
            "qjl_norms": tuple(outs),
            "qjl_signs": (width,),
        }
        return (mx.uint32 if name in ("weight", "qjl_packed") else mx.float16), shapes[name]

    def module(self) -> nn.Module:
        weight, scales, bias = self.parts["weight"], self.parts["scales"], self.parts.get("bias")
        if len(self.shape) == 3:
            return ExpertsLinear(Experts([self._packed(weight[e], scales[e]) for e in range(self.shape[0])]), bias)
        return TurboQuantLinear(self._packed(weight, scales), bias, self._residual())

    def _packed(self, words: mx.array, scales: mx.array) -> PackedWeight:
        packed = _repacked(words, self.values, self.shape[-1])
        mx.eval(packed, scales)
        return PackedWeight(packed, scales, self.codebook, self.signs, self.block)

    def _residual(self) -> RotatedResidual | None:
        if "qjl_packed" not in self.parts:
            return None
        width = self.shape[-1]
        unit = math.sqrt(math.pi / (2 * width))
        packed, norms = self.parts["qjl_packed"], self.parts["qjl_norms"][:, None]
        signs = self.parts["qjl_signs"].astype(mx.float32)
        mx.eval(packed, norms, signs)
        weight = PackedWeight(packed, norms, (-unit, unit), signs, hadamard_block(width))
        return RotatedResidual(self.signs, self.block, weight)


def _repacked(words: mx.array, values: int, width: int) -> mx.array:
    """Words (out, n) of turboquant-mlx as words (out, width * bits / 32) of this project."""
    if values not in (3, 8):
        return words  # the same in both: these codes fill words without a rest
    step = max(1, CHUNK_VALUES // width)
    rows = [_codes(words[first : first + step], values)[:, :width] for first in range(0, words.shape[0], step)]
    packed = [pack(codes, _BITS[values]) for codes in rows]
    mx.eval(packed)
    return mx.concatenate(packed)


def _codes(words: mx.array, values: int) -> mx.array:
    """All codes (out, codes) of words (out, n): digits of base 3, or ten codes of 3 bits."""
    places = [3**i for i in range(20)] if values == 3 else [8**i for i in range(10)]
    digits = words[..., None] // mx.array(places, mx.uint32) % values
    return digits.reshape(words.shape[0], -1)
