"""Writing a converted model back as one that others open: in float, or in one of MLX's own quantizations."""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from quant_engine import mlx_lm_adapter as adapter
from quant_engine import turboquant_mlx
from quant_engine.blueprint import DTYPES, MAX_SHARD_BYTES
from quant_engine.convert import Meter, cast_piece, extra_files
from quant_engine.errors import OutputError, RecipeError, UnsupportedModelError
from quant_engine.folding import Folding
from quant_engine.journal import OutputFile
from quant_engine.manifest import Manifest, ModuleEntry
from quant_engine.mlx_lm_config import readable
from quant_engine.model_card import export_card, licence
from quant_engine.output_folder import atomic_folder
from quant_engine.parameters import Packing
from quant_engine.progress import Progress, silent
from quant_engine.quantizer import CHUNK_VALUES, QuantizedWeight, dequantize_weight
from quant_engine.residual import Residual
from quant_engine.safetensors_file import (
    FLOATS,
    SafetensorsWriter,
    TensorInfo,
    TensorSpec,
    assign_shards,
    decode,
    file_bytes,
    index_json,
)
from quant_engine.source import INDEX, Source, resolve
from quant_engine.turning import Turning

FORMS = ("float", "affine", "mxfp4")
AFFINE_BITS = (2, 3, 4, 6, 8)
AFFINE_GROUP_SIZES = (32, 64, 128)
_MXFP4 = Packing(4, 32, "mxfp4")


@dataclass(frozen=True)
class ExportResult:
    """A model that was written for others.

    form: one of FORMS. bits and group_size: of its quantization, None for float. dtype: of float weights, scales and
    biases. bits_per_weight: of the quantized modules, counted from the bytes on disk, None for float. size_bytes: of
    the safetensors files. seconds: in all.
    """

    path: Path
    form: str
    bits: int | None
    group_size: int | None
    dtype: str
    bits_per_weight: float | None
    size_bytes: int
    seconds: float
    files: list[OutputFile]


def export(
    model: str | Path,
    output: str | Path,
    *,
    form: str = "float",
    bits: int | None = None,
    group_size: int | None = None,
    dtype: str = "bfloat16",
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress = silent,
) -> ExportResult:
    """Write a TurboQuant model (folder or Hub repository) to the folder `output`, as plain mlx-lm opens it.

    form: "float", dequantized, QJL's corrections added; "affine", MLX's own, bits 2, 3, 4, 6 or 8 (4 by default) in
    groups of 32, 64 or 128 (64); "mxfp4", 4 bits in groups of 32. The modules that TurboQuant quantized are those that
    get this form. dtype: "bfloat16", "float16" or "float32", of all other floats but those that mlx-lm keeps in
    float32. Tensors are named as mlx-lm's model names them. progress is told bytes of the source; memory stays within
    a few pieces of 2^20 weights.

    The folder appears when it is whole, or not at all. Raises UnsupportedModelError for a model that TurboQuant did not
    convert, RecipeError for a form that does not exist or fit, OutputError where `output` cannot be written.
    """
    started = time.perf_counter()
    packing = _packing(form, bits, group_size)
    if dtype not in DTYPES:
        raise RecipeError(f"dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    source = resolve(model, progress=progress)
    target = Path(output).expanduser().absolute()
    if target.resolve() == source.path.resolve():
        raise OutputError(f"{target} is the model itself; choose another output")
    drawn = _draw(source, packing, dtype, max_shard_bytes)
    extra = extra_files(source)
    size = sum(file_bytes(shard) for shard in drawn.shards.values()) + sum(file.stat().st_size for file in extra)
    with atomic_folder(target, size_bytes=size, overwrite=overwrite) as folder:
        _write_weights(folder, source, drawn, progress)
        _write_rest(folder, target.name, source, drawn, form, extra)
        names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        files = [OutputFile.of(folder, name) for name in names]
    return ExportResult(
        path=target,
        form=form,
        bits=packing.bits if packing else None,
        group_size=packing.group_size if packing else None,
        dtype=dtype,
        bits_per_weight=drawn.bits_per_weight if packing else None,
        size_bytes=sum(file.size_bytes for file in files if file.name.endswith(".safetensors")),
        seconds=time.perf_counter() - started,
        files=files,
    )


def _packing(form: str, bits: int | None, group_size: int | None) -> Packing | None:
    """The quantization that is asked for, None for float."""
    if form not in FORMS:
        raise RecipeError(f"form {form!r}; choose one of {', '.join(FORMS)}")
    if form == "affine":
        packing = Packing(4 if bits is None else bits, 64 if group_size is None else group_size, form)
        choices = {"bits": (packing.bits, AFFINE_BITS), "group_size": (packing.group_size, AFFINE_GROUP_SIZES)}
    else:
        packing = _MXFP4 if form == "mxfp4" else None
        fixed = asdict(packing) if packing else {"bits": None, "group_size": None}
        given = {"bits": bits, "group_size": group_size}
        choices = {name: (value, (fixed[name],)) for name, value in given.items() if value is not None}
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            options = "none, it has no such setting" if allowed == (None,) else ", ".join(map(str, allowed))
            raise RecipeError(f"{name} {value} for form {form!r}, which takes {options}")
    return packing


class _Drawing(NamedTuple):
    """What will be written: packing of the manifest's modules, file dtype of floats, the files and what is in them.

    turning: takes out the rotation of a residual stream that is rotated between its ends.
    """

    manifest: Manifest
    packing: Packing | None
    dtype: str
    shards: Mapping[str, list[TensorSpec]]
    turning: Turning

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk for each weight of the modules, scales and all; 0 where there are none."""
        weights = sum(math.prod(entry.shape) for entry in self.manifest.modules.values())
        written = [spec for shard in self.shards.values() for spec in shard]
        nbytes = sum(s.nbytes for s in written if _is_packed(s.name, self.manifest.modules))
        return 8 * nbytes / weights if weights else 0.0


def _is_packed(name: str, modules: Mapping[str, ModuleEntry]) -> bool:
    """Whether a tensor is one of a quantized module's, but for its bias, which is kept."""
    path, _, part = name.rpartition(".")
    return path in modules and part != "bias"


def _draw(source: Source, packing: Packing | None, dtype: str, max_shard_bytes: int) -> _Drawing:
    manifest = Manifest.from_config(source.config)
    if turboquant_mlx.block_of(source.config) is not None:
        raise UnsupportedModelError(
            f"{source.name} was made by turboquant-mlx; it can be run here and not exported: convert "
            "the original model with tq-mcp convert, and export that"
        )
    if manifest is None:
        raise UnsupportedModelError(
            f"{source.name} was not converted by TurboQuant, so there is nothing to export; give a model that "
            "tq-mcp convert made, or quantize this one with mlx_lm.convert"
        )
    if packing:
        _check_widths(manifest, packing.group_size)
    may_cast = adapter.may_cast(source.config)
    groups: list[list[TensorSpec]] = []
    for name, info in source.tensors.items():
        path, _, part = name.rpartition(".")
        if not _is_packed(name, manifest.modules):
            floats = info.dtype in FLOATS and may_cast(name)
            groups.append([TensorSpec(name, DTYPES[dtype] if floats else info.dtype, info.shape)])
        elif part == "weight":
            groups.append(_module_specs(path, manifest.modules[path], packing, DTYPES[dtype]))
    shards = assign_shards(groups, max_shard_bytes)
    return _Drawing(manifest, packing, DTYPES[dtype], shards, _turning(source.config, manifest))


def _turning(config: Mapping[str, Any], manifest: Manifest) -> Turning:
    """What takes the rotation out where a plain model would lack its ends; other folded weights are a plain model's."""
    if manifest.stream_block == 1:
        return Turning(frozenset(), frozenset(), lambda rows: rows)
    folding = replace(Folding.of(config, manifest.config), block=manifest.stream_block)
    return Turning(folding.rows, folding.outputs, folding.unrotate)


def _check_widths(manifest: Manifest, group_size: int) -> None:
    fitting = [g for g in AFFINE_GROUP_SIZES if all(e.shape[-1] % g == 0 for e in manifest.modules.values())]
    for path, entry in manifest.modules.items():
        if entry.shape[-1] % group_size:
            raise RecipeError(
                f"group_size {group_size} does not divide the width {entry.shape[-1]} of {path}; the sizes that fit "
                f"this model are {', '.join(map(str, fitting))}"
            )


def _module_specs(path: str, entry: ModuleEntry, packing: Packing | None, dtype: str) -> list[TensorSpec]:
    *out, width = entry.shape
    if packing is None:
        return [TensorSpec(f"{path}.weight", dtype, entry.shape)]
    groups = (*out, width // packing.group_size)
    weight = TensorSpec(f"{path}.weight", "U32", (*out, width * packing.bits // 32))
    if packing.mode == "mxfp4":
        return [weight, TensorSpec(f"{path}.scales", "U8", groups)]
    return [weight, TensorSpec(f"{path}.scales", dtype, groups), TensorSpec(f"{path}.biases", dtype, groups)]


def _write_weights(folder: Path, source: Source, drawn: _Drawing, progress: Progress) -> None:
    total = sum(info.nbytes for info in source.tensors.values())
    meter = Meter(progress, total)
    for file, specs in drawn.shards.items():
        with SafetensorsWriter(folder / file, specs) as writer:
            for spec in specs:
                path, _, part = spec.name.rpartition(".")
                packed = _is_packed(spec.name, drawn.manifest.modules)
                if packed and part == "weight":
                    _write_module(writer, _Module(source.tensors, drawn.manifest, path), drawn, meter)
                elif not packed and spec.name in drawn.turning:
                    _turn(writer, source.tensors[spec.name], spec, drawn.turning, meter)
                elif not packed:
                    _copy(writer, source.tensors[spec.name], spec, meter)
    if len(drawn.shards) > 1:
        (folder / INDEX).write_text(index_json(drawn.shards))
    progress(total, total, "weights written")


def _copy(writer: SafetensorsWriter, info: TensorInfo, spec: TensorSpec, meter: Meter) -> None:
    for piece in info.chunks():
        same = info.dtype == spec.dtype
        writer.write(spec.name, piece if same else cast_piece(decode(piece, info.dtype), spec))
        meter.add(piece.nbytes, spec.name)


def _turn(writer: SafetensorsWriter, info: TensorInfo, spec: TensorSpec, turning: Turning, meter: Meter) -> None:
    count, width = math.prod(info.shape[:-1]), info.shape[-1]
    step = max(1, CHUNK_VALUES // width)
    for first in range(0, count, step):
        last = min(first + step, count)
        writer.write(spec.name, cast_piece(turning.rows(info.name, (count, width), info.rows, first, last), spec))
        meter.add(info.nbytes * last // count - info.nbytes * first // count, info.name)


class _Module(NamedTuple):
    """A quantized module of a model."""

    tensors: Mapping[str, TensorInfo]
    manifest: Manifest
    path: str

    @property
    def entry(self) -> ModuleEntry:
        return self.manifest.modules[self.path]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors but the bias."""
        return sum(self.tensors[f"{self.path}.{part}"].nbytes for part in self.entry.tensors())

    def rows(self, first: int, last: int) -> mx.array:
        """Rows [first, last), those of all experts in order, dequantized to float32."""
        entry, tensors = self.entry, self.tensors
        errors = None
        if entry.qjl:
            signs = tensors[f"{self.path}.qjl_signs"].words(first, last)
            norms = tensors[f"{self.path}.qjl_norms"].rows(0, 1)[0, first:last]
            errors = Residual(signs, norms, entry.shape[-1], self.manifest.seed)
        weight = QuantizedWeight(
            tensors[f"{self.path}.weight"].words(first, last),
            tensors[f"{self.path}.scales"].rows(first, last),
            self.manifest.codebook(entry.bits),
            entry.bits,
            entry.group_size,
            self.manifest.seed,
            entry.block,
            errors,
        )
        return dequantize_weight(weight)


def _write_module(writer: SafetensorsWriter, module: _Module, drawn: _Drawing, meter: Meter) -> None:
    path, packing = module.path, drawn.packing
    *outs, width = module.entry.shape
    spec = TensorSpec(f"{path}.weight", drawn.dtype, module.entry.shape)
    count, step = math.prod(outs), max(1, CHUNK_VALUES // width)
    for first in range(0, count, step):
        last = min(first + step, count)
        values = cast_piece(drawn.turning.rows(spec.name, (count, width), module.rows, first, last), spec)
        if packing is None:
            writer.write(spec.name, values)
        else:
            made = mx.quantize(values, packing.group_size, packing.bits, packing.mode)
            for part, array in zip(("weight", "scales", "biases"), made, strict=False):  # mxfp4 has no biases
                writer.write(f"{path}.{part}", array)
        meter.add(module.nbytes * last // count - module.nbytes * first // count, path)


def _write_rest(folder: Path, name: str, source: Source, drawn: _Drawing, form: str, extra: list[Path]) -> None:
    for file in extra:
        copy = folder / file.relative_to(source.path)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(file.read_bytes())
    config = _config(source.config, drawn)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    original = drawn.manifest.source
    card = export_card(name, original, source.name, form, licence(source.path / "README.md"))
    (folder / "README.md").write_text(card, encoding="utf-8")


def _config(original: Mapping[str, Any], drawn: _Drawing) -> dict[str, Any]:
    """The config that plain mlx-lm reads: without TurboQuant's block and without that of an original's quantization."""
    dtypes = {file: name for name, file in DTYPES.items()}
    config = _float_config(readable(original), dtypes[drawn.dtype])
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = _float_config(config["text_config"], dtypes[drawn.dtype])
    if drawn.packing:
        config["quantization"] = asdict(drawn.packing)
    return config


def _float_config(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}
    return kept | {key: dtype for key in ("dtype", "torch_dtype") if key in kept}
