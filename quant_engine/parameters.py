"""The parameters of mlx-lm's model of a checkpoint: each as a file holds it, or as mlx-lm makes it from what they hold.

Architectures are published in other shapes than they run in: experts one by one or fused, convolutions transposed,
norms without their one, prefixes. mlx-lm's `sanitize` knows each; here it works on arrays that are not read yet. What
it hands through untouched is read from its file piece by piece, what it makes is computed when it is asked for.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from metal_kernels import device
from quant_engine import mlx_lm_adapter as adapter
from quant_engine.errors import CorruptCheckpointError, UnsupportedModelError
from quant_engine.lineage import lineage
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
        algorithm = block.get("quant_algo")
        method = str(block.get("quant_method") or block.get("mode") or algorithm or "affine")
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
            named = f"{method}, {algorithm}" if algorithm and algorithm != method else method
            raise UnsupportedModelError(
                f"this model is quantized already ({named}), in a way that is not undone here; give the original "
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
    nbytes: what the checkpoint holds for it. files: those that it is read or computed from. rotated: whether its rows
    come rotated already.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stored: TensorInfo | None
    packing: Packing | None
    nbytes: int
    files: frozenset[Path]
    rotated: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the arrays that hold it."""
        path = self.name.rpartition(".")[0]
        return (self.name, f"{path}.scales", f"{path}.biases") if self.packing else (self.name,)

    @property
    def matrix(self) -> tuple[int, int]:
        """The shape with all axes but the last as one."""
        return math.prod(self.shape[:-1]), self.shape[-1] if self.shape else 1


class Parameters(Mapping[str, Parameter]):
    """The parameters by name. `unused`: tensors of the checkpoint that the model has no use for. `stream_block`: see
    `Manifest`.

    Made from headers alone; values are read by `rows` and `pieces`. Those of the first files come first, so that
    whoever reads them in order needs few files at a time. Raises UnsupportedModelError for weights that are quantized
    in a way that is not undone here, CorruptCheckpointError where tensors are missing that mlx-lm needs.
    """

    stream_block = 1

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
        self._config, self._tensors = config, tensors
        packing = Packing.of(config)
        marks = {info.path: mx.zeros(()) for info in tensors.values()}
        blanks = {
            name: mx.broadcast_to(marks[info.path].astype(_computing(info)), info.shape)
            for name, info in tensors.items()
        }
        origins = {id(blank): tensors[name] for name, blank in blanks.items()}
        made = sanitized(config, blanks)
        handed_on = {origins[id(array)].name for array in made.values() if id(array) in origins}
        self.unused = self._unused(blanks, set(made), set(tensors) - handed_on)
        self._check_float8(blanks)
        files = _files(made, origins, marks)
        self._parameters: dict[str, Parameter] = {}
        for name, array in made.items():
            path, _, part = name.rpartition(".")
            if part in ("scales", "biases") and made.get(f"{path}.weight", array).dtype == mx.uint32:
                continue
            stored, scales = origins.get(id(array)), made.get(f"{path}.scales")
            if packing and part == "weight" and array.dtype == mx.uint32 and scales is not None:
                own = packing.for_module(path, config)
                parts = frozenset[Path]().union(*(files.get(f"{path}.{p}", ()) for p in ("weight", "scales", "biases")))
                self._parameters[name] = _packed(name, array, scales, made.get(f"{path}.biases"), own, parts)
                continue
            dtype = stored.dtype if stored else _NAMES[array.dtype]
            nbytes = array.size * SIZES[dtype]
            self._parameters[name] = Parameter(name, dtype, array.shape, stored, None, nbytes, files[name])
        self._parameters = by_file(self._parameters)
        self.use({info.path: info.path for info in tensors.values()})

    def __getitem__(self, name: str) -> Parameter:
        return self._parameters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    @property
    def working_bytes(self) -> int:
        """What holding one takes at most, of those that are not read piece by piece."""
        return 2 * max((p.nbytes for p in self._parameters.values() if not p.stored), default=0)

    def use(self, places: Mapping[Path, Path]) -> None:
        """Read what comes next from these files, and let go of all others.

        places: where each is now, by the path that its tensors name. At first, all are where their tensors say.
        """
        self._places = dict(places)
        self._loaded: dict[str, mx.array] = {}
        self._waiting: dict[str, mx.array] = {}
        self._current: tuple[str, list[mx.array]] = ("", [])

    def pieces(self, name: str) -> Iterator[Callable[[], NDArray[np.uint8]]]:
        """What reads the bytes of a parameter that is `stored`, as they are there, at most 4 MB each, in any thread.

        They raise CorruptCheckpointError for NaN or infinite values.
        """
        info = self._at_hand(self._parameters[name])
        return (partial(info.chunk, start) for start in info.chunk_starts)

    def raw_rows(self, name: str, first: int, last: int) -> NDArray[np.uint8] | None:
        """What `rows` can be given to make its values from, read now, in any thread; None where MLX reads or computes.

        Where MLX reads, it reads the whole parameter with the first row. Raises as `rows` does.
        """
        parameter = self[name]
        if _by_pieces(parameter):
            return self._at_hand(parameter).raw_rows(first, last)
        if parameter.stored and first == 0:
            self._loaded[name] = self._load(parameter)
        return None

    def rows(self, name: str, first: int, last: int, raw: NDArray[np.uint8] | None = None) -> mx.array:
        """Rows [first, last) of a parameter as a matrix (see `Parameter.matrix`), float, dequantized.

        raw: `raw_rows` of the same rows, where they were read before. Raises CorruptCheckpointError for NaN or infinite
        values, UnsupportedModelError for dtypes that are no weights.
        """
        parameter = self._parameters[name]
        if _by_pieces(parameter):
            return self._at_hand(parameter).rows(first, last, raw)
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
        """The arrays of a parameter as matrices, computed or read by MLX; those of the last one asked for are kept."""
        if self._current[0] != parameter.name:
            self._current = ("", [])
            arrays = [self._whole(parameter)] if parameter.stored else self._computed(parameter)
            matrices = [array.reshape(math.prod(array.shape[:-1]), array.shape[-1]) for array in arrays]
            mx.eval(matrices)
            self._current = (parameter.name, matrices)
        return self._current[1]

    def _computed(self, parameter: Parameter) -> list[mx.array]:
        if not self._waiting.keys() >= {parameter.name}:
            self._waiting = self._compute()
        return [self._waiting.pop(name) for name in parameter.parts if name in self._waiting]

    def _whole(self, parameter: Parameter) -> mx.array:
        return self._loaded.pop(parameter.name) if parameter.name in self._loaded else self._load(parameter)

    def _load(self, parameter: Parameter) -> mx.array:
        """A parameter of a file, read now, in any thread: MLX evaluates in the thread in which it opened."""
        info = self._at_hand(parameter)
        read = cast(dict[str, mx.array], mx.load(str(info.path)))[info.name]
        mx.eval(read)
        return read

    def _at_hand(self, parameter: Parameter) -> TensorInfo:
        info = cast(TensorInfo, parameter.stored)
        return replace(info, path=self._places[info.path])

    def _compute(self) -> dict[str, mx.array]:
        """Every parameter that the files in use suffice for and that is not read from them piece by piece, to be
        computed when it is evaluated."""
        held: dict[str, mx.array] = {}
        for place in sorted(self._places.values()):
            held |= cast(dict[str, mx.array], mx.load(str(place)))
        loaded = {
            name: held[name].astype(_computing(info)) if name in held else mx.zeros(info.shape, _computing(info))
            for name, info in self._tensors.items()
        }
        made = sanitized(self._config, loaded)
        ready = {
            part
            for p in self._parameters.values()
            if p.files <= self._places.keys() and not p.stored
            for part in p.parts
        }
        return {name: array for name, array in made.items() if name in ready}

    def _unused(self, blanks: Mapping[str, mx.array], made: set[str], doubtful: set[str]) -> set[str]:
        """Those of `doubtful` without which mlx-lm makes the same parameters, tried kind by kind (numbers aside)."""
        return {name for names in _kinds(doubtful) if self._makes(blanks, names) == made for name in names}

    def _check_float8(self, blanks: Mapping[str, mx.array]) -> None:
        """Raise UnsupportedModelError for tensors of 8-bit floats that mlx-lm hands on or takes for integers.

        MLX holds them as integers. Where mlx-lm undoes them, it refuses to undo any other dtype.
        """
        used = {name for name, info in self._tensors.items() if info.dtype in ("F8_E4M3", "F8_E5M2")} - self.unused
        for names in _kinds(used):
            first = self._tensors[min(names)]
            others = {name: blanks[name].astype(mx.bfloat16) for name in names}
            try:
                adapter.sanitize(self._config, {**blanks, **others})
            except ValueError:
                if first.dtype == "F8_E4M3":  # the one that MLX knows
                    continue
            raise UnsupportedModelError(
                f"tensor {first.name} is {first.dtype}, which mlx-lm does not undo for this architecture; give "
                "the original model in float16, bfloat16 or float32"
            )

    def _makes(self, blanks: Mapping[str, mx.array], without: set[str]) -> set[str]:
        try:
            return set(sanitized(self._config, {n: b for n, b in blanks.items() if n not in without}))
        except CorruptCheckpointError:
            return set()


def _by_pieces(parameter: Parameter) -> bool:
    """Whether a parameter is read from its place a piece at a time, not computed, and not by MLX.

    On CUDA MLX reads whole tensors: arrays that are handed to it there go through memory that moves page by page.
    """
    return parameter.stored is not None and device() != "cuda"


def _files(
    made: Mapping[str, mx.array], origins: Mapping[int, TensorInfo], marks: Mapping[Path, mx.array]
) -> dict[str, frozenset[Path]]:
    """The files that each of `made` is read or computed from; what it is computed from depends on its file's mark."""
    read = {name: frozenset({origins[id(array)].path}) for name, array in made.items() if id(array) in origins}
    paths = {path.name: path for path in marks}
    needs = lineage(
        {name: array for name, array in made.items() if name not in read},
        {name: marks[path] for name, path in paths.items()},
    )
    return read | {name: frozenset(paths[file] for file in files) for name, files in needs.items()}


def _kinds(names: Iterable[str]) -> list[set[str]]:
    """Names that differ in numbers only, together."""
    kinds: dict[str, set[str]] = {}
    for name in sorted(names):
        kinds.setdefault(re.sub(r"\d+", "#", name), set()).add(name)
    return list(kinds.values())


def _computing(info: TensorInfo) -> mx.Dtype:
    """The dtype that mlx-lm gets a tensor in: vectors in float32, so that a norm's "one plus" does not round."""
    return mx.float32 if len(info.shape) == 1 and info.dtype in FLOATS else _DTYPES[info.dtype]


def by_file(parameters: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """In the order of the last file that each needs, then of the first, so that files can be let go of early."""

    def order(item: tuple[str, Parameter]) -> tuple[str, str]:
        names = sorted(path.name for path in item[1].files) or [""]
        return names[-1], names[0]

    return dict(sorted(parameters.items(), key=order))


def _packed(
    name: str, weight: mx.array, scales: mx.array, biases: mx.array | None, packing: Packing, files: frozenset[Path]
) -> Parameter:
    shape = (*weight.shape[:-1], weight.shape[-1] * 32 // packing.bits)
    dtype = _NAMES[scales.dtype] if packing.mode == "affine" else "BF16"
    nbytes = weight.nbytes + scales.nbytes + (0 if biases is None else biases.nbytes)
    return Parameter(name, dtype, shape, None, packing, nbytes, files)


def sanitized(config: Mapping[str, Any], weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """A checkpoint's tensors as mlx-lm's model of a config names and shapes them.

    Raises CorruptCheckpointError where tensors are missing that mlx-lm needs, or do not fit.
    """
    try:
        return adapter.sanitize(config, weights)
    except KeyError as error:
        raise CorruptCheckpointError(
            f"the weights lack {error}, which the model in config.json has; if its numbers of layers and experts are "
            "right, download the model again, whole"
        ) from error
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise CorruptCheckpointError(
            f"the weights do not fit the model in config.json: {error}; download the model again, whole"
        ) from error
