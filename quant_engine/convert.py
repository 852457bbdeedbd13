"""Converting a model: from safetensors to safetensors, a piece of a layer at a time."""

import hashlib
import json
import resource
import sys
import time
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from quant_engine import blueprint
from quant_engine.blueprint import Blueprint
from quant_engine.config import QuantConfig
from quant_engine.errors import OutputError, RecipeError
from quant_engine.folded_parameters import parameters_of
from quant_engine.journal import Journal, OutputFile
from quant_engine.manifest import Manifest
from quant_engine.model_card import licence, model_card
from quant_engine.output_folder import atomic_folder, check_target
from quant_engine.parameters import Parameters
from quant_engine.progress import Progress, silent
from quant_engine.quantizer import CHUNK_VALUES, quantize_weight
from quant_engine.safetensors_file import (
    SafetensorsWriter,
    TensorSpec,
    index_json,
)
from quant_engine.shards import DOWNLOADS, Shards, most_fetched, read_order
from quant_engine.source import INDEX, SMALL_FILES, Source, peek

_MADE_HERE = ("config.json", "README.md", INDEX)
LARGEST_SCALE = 65504
"""Of float16; a scale that would be larger is cut off there."""

_MLX_DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}


@dataclass(frozen=True)
class ConversionResult:
    """A conversion that was carried out.

    source: name, revision and content_sha256 of the original. bits_per_weight: of the quantized modules,
    counted from the bytes on disk. size_bytes and source_size_bytes: of the safetensors files. parameters:
    of the model, and quantized_parameters of them in `modules` layers; excluded: why others are kept, by
    path. seconds: of this run. peak_memory_bytes: the most that the process held so far, weights or not.
    """

    path: Path
    source: dict[str, str | None]
    config: QuantConfig
    bits_per_weight: float
    size_bytes: int
    source_size_bytes: int
    parameters: int
    quantized_parameters: int
    modules: int
    excluded: dict[str, str]
    seconds: float
    peak_memory_bytes: int
    files: list[OutputFile]


def convert(
    source: str | Path,
    output: str | Path,
    *,
    config: QuantConfig | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    keep_unfitting: bool = False,
    keep_source: bool = False,
    overwrite: bool = False,
    max_shard_bytes: int = blueprint.MAX_SHARD_BYTES,
    progress: Progress = silent,
) -> ConversionResult:
    """Convert a model folder or Hub repository (at `revision`) to TurboQuant in the folder `output`.

    config: the recipe, 3 bits in groups of 64 by default. dtype: "float32", "float16" or "bfloat16" for
    weights that are not quantized, by default each as it came, bit for bit. keep_unfitting: keep layers
    whose width the recipe does not fit instead of raising. progress is told bytes of the source. Memory
    stays within a few pieces of 2^20 weights, whatever the model's size; where the recipe says fold_rotation, one
    layer's weight in float32 comes on top.

    A repository's weights are fetched file by file, when they are needed, at one commit, and dropped when they are
    not needed any more; with keep_source they go to Hugging Face's cache and stay. What is in that cache already is
    used and left.

    The folder appears when it is whole; an exception, from `progress` too, leaves nothing. What a killed process
    left beside it is continued, from the last shard that was finished, by the same conversion of the same content,
    and removed by another one; so is what a lost network or a full disk stopped, of a repository. Raises a
    TurboQuantError that says what is wrong with source, recipe or output.
    """
    started = time.perf_counter()
    recipe = config or QuantConfig()
    origin = peek(source, revision=revision, progress=progress)
    target = Path(output).expanduser().absolute()
    if target.resolve() == origin.path.resolve():
        raise OutputError(f"{target} is the source itself; choose another output")
    found = parameters_of(origin.config, origin.tensors, recipe)
    drawn = blueprint.draw(
        origin.config,
        found,
        recipe,
        dtype=dtype,
        keep_unfitting=keep_unfitting,
        max_shard_bytes=max_shard_bytes,
    )
    extra = extra_files(origin)
    check_target(target, overwrite)
    if origin.repo is None:
        progress(0, sum(parameter.nbytes for parameter in found.values()), "reading the source for its hash")
    manifest = Manifest.of(recipe, drawn.modules, drawn.excluded, origin.origin(), found.stream_block)
    size = drawn.size_bytes + sum(file.stat().st_size for file in extra)
    if not keep_source:
        size += most_fetched(found, read_order(found, drawn.shards), origin.missing)
    key, remote = _key(manifest, drawn), origin.repository is not None
    with atomic_folder(target, size_bytes=size, overwrite=overwrite, key=key, keep=remote) as folder:
        journal = Journal(folder, spare=DOWNLOADS)
        meter = Meter(progress, sum(parameter.nbytes for parameter in found.values()))
        _Weights(origin, found, drawn, recipe, meter).write(folder, journal, keep_source)
        _write_rest(folder, target.name, origin, drawn, manifest, dtype, extra)
        files = journal.close()
    weights = sum(file.size_bytes for file in files if file.name.endswith(".safetensors"))
    return ConversionResult(
        path=target,
        source=origin.origin(),
        config=recipe,
        bits_per_weight=drawn.bits_per_weight,
        size_bytes=weights,
        source_size_bytes=origin.size_bytes,
        parameters=drawn.parameters,
        quantized_parameters=drawn.quantized_parameters,
        modules=len(drawn.modules),
        excluded=dict(drawn.excluded),
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory_bytes(),
        files=files,
    )


def peak_memory_bytes() -> int:
    """The most memory that this process has held, resident.

    Linux hands `ru_maxrss` on to child processes, so there the figure is read from the kernel's own table.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Meter:
    """Counts bytes of the source that are done."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def add(self, count: int, name: str) -> None:
        """Report `count` bytes more, and what is worked on."""
        self._done += count
        self.say(name)

    def say(self, what: str) -> None:
        """Report what goes on while no bytes are done."""
        self._progress(self._done, self._total, what)


def _key(manifest: Manifest, drawn: Blueprint) -> str:
    """A hash of all that the bytes of the shards depend on, but not of the name of a folder that was hashed itself."""
    source = dict(manifest.source)
    if source["content_sha256"]:
        del source["name"]
    shards = {file: [astuple(spec) for spec in specs] for file, specs in drawn.shards.items()}
    made = [manifest.to_dict() | {"source": source}, shards, str(mx.default_device())]
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class _Weights:
    """The weights of a conversion, written shard by shard."""

    source: Source
    found: Parameters
    drawn: Blueprint
    recipe: QuantConfig
    meter: Meter

    def write(self, folder: Path, journal: Journal, keep_source: bool) -> None:
        """Write the shards that are not finished yet."""
        shards, found = self.drawn.shards, self.found
        left = {file: specs for file, specs in shards.items() if file not in journal.finished}
        order = read_order(found, left)
        if len(left) < len(shards):
            before = sum(parameter.nbytes for parameter in found.values()) - sum(found[name].nbytes for name in order)
            finished = len(shards) - len(left)
            self.meter.add(before, f"continuing: {finished} of {len(shards)} shards were finished before")
        origin = Shards(self.source, found, order, folder / DOWNLOADS, keep=keep_source, say=self.meter.say)
        for file, specs in left.items():
            with SafetensorsWriter(folder / file, specs) as writer:
                for name in read_order(found, {file: specs}):
                    with origin.reading(name):
                        self._write_parameter(writer, name)
            journal.add(file)
        origin.close()
        if len(shards) > 1:
            (folder / INDEX).write_text(index_json(shards))
        self.meter.say("weights written")

    def _write_parameter(self, writer: SafetensorsWriter, name: str) -> None:
        if name in self.drawn.kept:
            self._copy(writer, self.drawn.kept[name])
        else:
            self._quantize(writer, name.removesuffix(".weight"))

    def _quantize(self, writer: SafetensorsWriter, path: str) -> None:
        weight, entry = self.found[f"{path}.weight"], self.drawn.modules[path]
        recipe = replace(self.recipe, group_size=entry.group_size)
        out, width = weight.matrix
        step = max(1, CHUNK_VALUES // width)
        for first in range(0, out, step):
            last = min(first + step, out)
            rows = self.found.rows(weight.name, first, last)
            part = quantize_weight(rows, recipe, entry.bits, entry.block)
            _check_scales(part.scales, rows, path)
            writer.write(f"{path}.weight", part.packed)
            writer.write(f"{path}.scales", part.scales)
            if part.residual is not None:
                writer.write(f"{path}.qjl_signs", part.residual.signs)
                writer.write(f"{path}.qjl_norms", part.residual.norms)
            self.meter.add(weight.nbytes * last // out - weight.nbytes * first // out, path)

    def _copy(self, writer: SafetensorsWriter, spec: TensorSpec) -> None:
        parameter = self.found[spec.name]
        if parameter.stored and spec.dtype == parameter.stored.dtype:
            for piece in self.found.pieces(spec.name):
                writer.write(spec.name, piece)
                self.meter.add(piece.nbytes, spec.name)
            return
        count, width = parameter.matrix
        step = max(1, CHUNK_VALUES // max(1, width))
        for first in range(0, count, step):
            last = min(first + step, count)
            writer.write(spec.name, cast_piece(self.found.rows(spec.name, first, last), spec))
            self.meter.add(parameter.nbytes * last // count - parameter.nbytes * first // count, spec.name)


def _check_scales(scales: mx.array, rows: mx.array, path: str) -> None:
    """Raise RecipeError where weights are too large for their scales."""
    if scales.max() >= LARGEST_SCALE:
        raise RecipeError(
            f"{path} has weights up to {mx.abs(rows).max().item():.3g}, which float16 scales cannot hold; leave it "
            f'whole (skip "{path}"), or download the model again if it should have none'
        )


def cast_piece(values: mx.array, spec: TensorSpec) -> mx.array:
    """Float values in the dtype that a tensor is written in. Raises RecipeError where one is beyond its range."""
    cast = values.astype(_MLX_DTYPES[spec.dtype])
    if not mx.all(mx.isfinite(cast)):
        raise RecipeError(
            f"tensor {spec.name} has values beyond the range of {spec.dtype}; use bfloat16 or float32, or leave "
            "the dtype as it is"
        )
    return cast


def extra_files(source: Source) -> list[Path]:
    """Tokenizer, generation settings and chat templates, which are copied as they are."""
    found = {file for pattern in SMALL_FILES for file in source.path.glob(pattern) if file.is_file()}
    return sorted(file for file in found if file.name not in _MADE_HERE)


def _write_rest(
    folder: Path,
    name: str,
    source: Source,
    drawn: Blueprint,
    manifest: Manifest,
    dtype: str | None,
    extra: list[Path],
) -> None:
    for file in extra:
        copy = folder / file.relative_to(source.path)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(file.read_bytes())
    config: dict[str, Any] = {**source.config, "quantization": manifest.to_dict()}
    if dtype:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    terms = licence(source.path / "README.md")
    (folder / "README.md").write_text(
        model_card(name, manifest.source, manifest.config, drawn, terms), encoding="utf-8"
    )
