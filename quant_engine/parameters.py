"""The parameters of mlx-lm's model of a checkpoint: each as a file holds it, or as mlx-lm makes it from what they hold.

Architectures are published in other shapes than they run in: experts one by one or fused, convolutions transposed,
norms without their one, prefixes. mlx-lm's `sanitize` knows each; here it works on arrays that are not read yet. What
it hands through untouched is read from its file piece by piece, what it makes is computed when it is asked for.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from quant_engine import mlx_lm_adapter as adapter
from quant_engine.errors import CorruptCheckpointError, UnsupportedModelError
from quant_engine.manifest import METHOD
from quant_engine.safetensors_file import FLOATS, SIZES, TensorInfo

_DTYPES = {
    "BOOL": mx.bool_, "U8": mx.uint8, "I8": mx.int8, "U16": mx.uint16, "I16": mx.int16, "U32": mx.uint32,
    "I32": mx.int32, "U64": mx.uint64, "I64": mx.int64, "F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32,
    "F64": mx.float32, "F8_E4M3": mx.uint8, "F8_E5M2": mx.uint8, "F8_E8M0": mx.uint8,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in reversed(_DTYPES.items()) if not name.startswith(("F8", "F64"))}
_MODES = ("affine", "mxfp4", "mxfp8")


@dataclass(frozen=True)
class Packing:
    """How MLX quantized a weight: bits, values to a scale, and the mode that `mx.dequantize` takes."""

    bits: int
    group_size: int
    mode: str

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Packing | None":
        """The packing that a config.json states for its weights; None for float weights.

        Raises UnsupportedModelError, naming the method, for those that are not undone here.
        """
        block = _quantization(config)
        if not block:
            return None
        method = str(block.get("quant_method") or block.get("mode") or "affine")
        if method == METHOD:
            raise UnsupportedModelError(
                "this model was converted by TurboQuant already; run it as it is, or convert the "
                "original model with another recipe"
            )
        if method in ("mxfp4", "mxfp8"):
            return cls(4 if method == "mxfp4" else 8, 32, method)
        if method == "fp8":
            return None  # Where mlx-lm undoes it; `Parameters` refuses what stays.
        mode = str(block.get("mode", "affine"))
        if method not in _MODES or mode not in _MODES or "bits" not in block or "group_size" not in block:
            raise UnsupportedModelError(
                f"this model is quantized already ({method}), in a way that is not undone here; give the original "
                f"model in float16, bfloat16 or float32, or one quantized by MLX ({', '.join(_MODES)})"
            )
        return cls(block["bits"], block["group_size"], mode)

    def for_module(self, path: str, config: Mapping[str, Any]) -> "Packing":
        """This packing, or the one that the config states for a module of its own."""
        own = _quantization(config).get(path)
        if not isinstance(own, dict):
            return self
        stated = cast(dict[str, Any], own)
        return Packing(
            stated.get("bits", self.bits), stated.get("group_size", self.group_size), stated.get("mode", self.mode)
        )


def _quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    text = cast(dict[str, Any], config.get("text_config") or {})
    block: Any = (
        config.get("quantization") or config.get("quantization_config") or text.get("quantization_config") or {}
    )
    return cast(dict[str, Any], block) if isinstance(block, dict) else {"quant_method": block}


@dataclass(frozen=True)
class Parameter:
    """A parameter of the model: its name there, the dtype of its values by its name in the file format, and its shape.

    stored: where it lies, if it is in a file as it is. packing: how it is quantized there, None where it is not.
    nbytes: what the checkpoint holds for it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stored: TensorInfo | None
    packing: Packing | None
    nbytes: int

    @property
    def matrix(self) -> tuple[int, int]:
        """The shape with all axes but the last as one."""
        return math.prod(self.shape[:-1]), self.shape[-1]


class Parameters(Mapping[str, Parameter]):
    """The parameters by name. `unused`: tensors of the checkpoint that the model has no use for.

    Made from headers alone; values are read by `rows`. Raises UnsupportedModelError for weights that are quantized in a
    way that is not undone here, CorruptCheckpointError where tensors are missing that mlx-lm needs.
    """

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
        self._config, self._tensors = config, tensors
        packing = Packing.of(config)
        blanks = {name: mx.zeros(info.shape, _computing(info)) for name, info in tensors.items()}
        origins = {id(blank): tensors[name] for name, blank in blanks.items()}
        made = sanitized(config, blanks)
        handed_on = {origins[id(array)].name for array in made.values() if id(array) in origins}
        self.unused = self._unused(blanks, set(made), set(tensors) - handed_on)
        self._parameters: dict[str, Parameter] = {}
        for name, array in made.items():
            path, _, part = name.rpartition(".")
            if part in ("scales", "biases") and made.get(f"{path}.weight", array).dtype == mx.uint32:
                continue
            stored, scales = origins.get(id(array)), made.get(f"{path}.scales")
            if packing and part == "weight" and array.dtype == mx.uint32 and scales is not None:
                own = packing.for_module(path, config)
                self._parameters[name] = _packed(name, array, scales, made.get(f"{path}.biases"), own)
                continue
            if stored and stored.dtype.startswith("F8"):
                raise UnsupportedModelError(
                    f"tensor {stored.name} is {stored.dtype}, which mlx-lm does not undo for this architecture; give "
                    "the original model in float16, bfloat16 or float32"
                )
            dtype = stored.dtype if stored else _NAMES[array.dtype]
            self._parameters[name] = Parameter(name, dtype, array.shape, stored, None, array.size * SIZES[dtype])
        self._waiting: dict[str, mx.array] = {}
        self._current: tuple[str, list[mx.array]] = ("", [])

    def __getitem__(self, name: str) -> Parameter:
        return self._parameters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def rows(self, name: str, first: int, last: int) -> mx.array:
        """Rows [first, last) of a parameter as a matrix (see `Parameter.matrix`), float, dequantized.

        Raises CorruptCheckpointError for NaN or infinite values, UnsupportedModelError for dtypes that are no weights.
        """
        parameter = self[name]
        if parameter.stored and parameter.packing is None:
            return parameter.stored.rows(first, last)
        arrays = [array[first:last] for array in self._arrays(parameter)]
        if parameter.packing is None:
            values = arrays[0]
        else:
            how = parameter.packing
            values = mx.dequantize(*arrays, group_size=how.group_size, bits=how.bits, mode=how.mode)
        if not mx.all(mx.isfinite(values)):
            raise CorruptCheckpointError(
                f"parameter {name} has NaN or infinite values; the checkpoint is damaged: download it again, or report "
                "it to its author"
            )
        return values

    def _arrays(self, parameter: Parameter) -> list[mx.array]:
        """The arrays of a computed or packed parameter as matrices; those of the last one asked for are kept."""
        if self._current[0] != parameter.name:
            self._current = ("", [])
            path = parameter.name.rpartition(".")[0]
            names = [parameter.name]
            if parameter.packing:
                names += [f"{path}.scales", f"{path}.biases"]
            if not self._waiting.keys() >= {parameter.name}:
                self._waiting = self._compute()
            arrays = [self._waiting.pop(name) for name in names if name in self._waiting]
            matrices = [array.reshape(math.prod(array.shape[:-1]), array.shape[-1]) for array in arrays]
            mx.eval(matrices)
            self._current = (parameter.name, matrices)
        return self._current[1]

    def _compute(self) -> dict[str, mx.array]:
        """Every parameter that is not read from its file piece by piece, to be computed when it is evaluated."""
        loaded: dict[str, mx.array] = {}
        for path in sorted({info.path for info in self._tensors.values()}, key=Path.as_posix):
            loaded |= cast(dict[str, mx.array], mx.load(str(path)))
        loaded = {name: array.astype(_computing(self._tensors[name])) for name, array in loaded.items()}
        read = {p.name for p in self._parameters.values() if p.stored and p.packing is None}
        return {name: array for name, array in sanitized(self._config, loaded).items() if name not in read}

    def _unused(self, blanks: Mapping[str, mx.array], made: set[str], doubtful: set[str]) -> set[str]:
        """Those of `doubtful` without which mlx-lm makes the same parameters, tried kind by kind (numbers aside)."""
        kinds: dict[str, set[str]] = {}
        for name in doubtful:
            kinds.setdefault(re.sub(r"\d+", "#", name), set()).add(name)
        return {name for names in kinds.values() if self._makes(blanks, names) == made for name in names}

    def _makes(self, blanks: Mapping[str, mx.array], without: set[str]) -> set[str]:
        try:
            return set(sanitized(self._config, {n: b for n, b in blanks.items() if n not in without}))
        except CorruptCheckpointError:
            return set()


def _computing(info: TensorInfo) -> mx.Dtype:
    """The dtype that mlx-lm gets a tensor in: vectors in float32, so that a norm's "one plus" does not round."""
    return mx.float32 if len(info.shape) == 1 and info.dtype in FLOATS else _DTYPES[info.dtype]


def _packed(name: str, weight: mx.array, scales: mx.array, biases: mx.array | None, packing: Packing) -> Parameter:
    shape = (*weight.shape[:-1], weight.shape[-1] * 32 // packing.bits)
    dtype = _NAMES[scales.dtype] if packing.mode == "affine" else "BF16"
    nbytes = weight.nbytes + scales.nbytes + (0 if biases is None else biases.nbytes)
    return Parameter(name, dtype, shape, None, packing, nbytes)


def sanitized(config: Mapping[str, Any], weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """A checkpoint's tensors as mlx-lm's model of a config names and shapes them.

    Raises CorruptCheckpointError where tensors are missing that mlx-lm needs, or do not fit.
    """
    try:
        return adapter.sanitize(config, weights)
    except KeyError as error:
        raise CorruptCheckpointError(
            f"the weights lack {error}, which this architecture needs; download the model again, whole"
        ) from error
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise CorruptCheckpointError(
            f"the weights do not fit the model in config.json: {error}; download the model again, whole"
        ) from error
