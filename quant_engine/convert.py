"""Converting a model: from safetensors to safetensors, a piece of a layer at a time."""

import hashlib
import json
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from quant_engine import blueprint
from quant_engine.blueprint import Blueprint
from quant_engine.config import QuantConfig
from quant_engine.errors import CorruptCheckpointError, OutputError, RecipeError
from quant_engine.file_hash import RunningHash, file_sha256
from quant_engine.folded_parameters import parameters_of
from quant_engine.journal import Journal, OutputFile
from quant_engine.manifest import Manifest
from quant_engine.model_card import licence, model_card
from quant_engine.output_folder import atomic_folder, check_target
from quant_engine.parameters import Parameters
from quant_engine.pipeline import Threads, ahead
from quant_engine.policy import check_effect
from quant_engine.progress import Progress, silent
from quant_engine.quantizer import QuantizedWeight, chunk_rows, quantize_weight
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

Raw = NDArray[np.uint8] | None
Job = tuple[Callable[[], Raw], Callable[[Raw], Callable[[], None]]]
"""A piece of the source: what reads it, in any thread, and what begins to make of it what is written then."""

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
    stays within a few pieces of 2^20 weights (2^23 on a GPU; on CUDA, the tensors that these are pieces of on top),
    whatever the model's size; where the recipe says fold_rotation, one layer's weight in float32 comes on top. Other
    threads read, write and hash meanwhile; they have ended when it returns or raises.

    A repository's weights are fetched file by file, when they are needed, at one commit, and dropped when they are
    not needed any more; with keep_source they go to Hugging Face's cache and stay. What is in that cache already is
    used and left.

    The folder appears when it is whole; an exception, from `progress` too, leaves nothing. What a killed process
    left beside it is continued, from the last shard that was finished, by the same conversion of the same commit or
    of files that nothing has changed since (see `Source.identity`), and removed by another one; so is what a lost
    network or a full disk stopped, of a repository. Raises CorruptCheckpointError where a file of the source changes
    meanwhile, and otherwise a
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
    check_effect(recipe, drawn.modules, drawn.excluded)
    extra = extra_files(origin)
    check_target(target, overwrite)
    identity = origin.identity()
    manifest = Manifest.of(recipe, drawn.modules, drawn.excluded, {}, found.stream_block)
    size = drawn.size_bytes + sum(file.stat().st_size for file in extra)
    if not keep_source:
        size += most_fetched(found, read_order(found, drawn.shards), origin.missing)
    key, remote = _key(identity, manifest, drawn), origin.repository is not None
    with (
        atomic_folder(target, size_bytes=size, overwrite=overwrite, key=key, keep=remote) as folder,
        Threads() as threads,
    ):
        hashing = [threads.files.submit(file_sha256, file, threads.stopped) for file in origin.content_files]
        journal = Journal(folder, spare=DOWNLOADS)
        meter = Meter(progress, sum(parameter.nbytes for parameter in found.values()))
        _Weights(origin, found, drawn, recipe, meter, threads).write(folder, journal, keep_source)
        manifest = replace(manifest, source=_hashed(origin, identity, hashing, meter))
        _write_rest(folder, target.name, origin, drawn, manifest, dtype, extra)
        files = journal.close()
    weights = sum(file.size_bytes for file in files if file.name.endswith(".safetensors"))
    return ConversionResult(
        path=target,
        source=dict(manifest.source),
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


def _key(identity: dict[str, Any], manifest: Manifest, drawn: Blueprint) -> str:
    """A hash of all that the bytes of the shards depend on, but not of the place of a folder."""
    shards = {file: [astuple(spec) for spec in specs] for file, specs in drawn.shards.items()}
    made = [identity, manifest.to_dict(), shards, str(mx.default_device())]
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:32]


def _hashed(
    origin: Source, identity: dict[str, Any], hashing: Sequence[Future[str]], meter: Meter
) -> dict[str, str | None]:
    """`Source.origin` when the hashes have come. Raises CorruptCheckpointError where files have changed meanwhile."""
    while wait(hashing, timeout=0.5).not_done:
        meter.say("reading the source for its hash")
    found = origin.origin(file.result() for file in hashing)
    if origin.identity() != identity:
        raise CorruptCheckpointError(f"files of {origin.path} changed while they were converted; run it again")
    return found


@dataclass(frozen=True)
class _Weights:
    """The weights of a conversion, written shard by shard."""

    source: Source
    found: Parameters
    drawn: Blueprint
    recipe: QuantConfig
    meter: Meter
    threads: Threads

    def write(self, folder: Path, journal: Journal, keep_source: bool) -> None:
        """Write the shards that are not finished yet; each is finished while the next one is made."""
        shards, found = self.drawn.shards, self.found
        left = {file: specs for file, specs in shards.items() if file not in journal.finished}
        order = read_order(found, left)
        if len(left) < len(shards):
            before = sum(parameter.nbytes for parameter in found.values()) - sum(found[name].nbytes for name in order)
            finished = len(shards) - len(left)
            self.meter.add(before, f"continuing: {finished} of {len(shards)} shards were finished before")
        origin = Shards(self.source, found, order, folder / DOWNLOADS, keep=keep_source, say=self.meter.say)
        pool = self.threads.pieces
        finishing = pool.submit(bool)
        for file, specs in left.items():
            running = RunningHash(folder / file, pool)
            with SafetensorsWriter(folder / file, specs, pool, running.whole) as writer:
                write: Callable[[], object] = bool
                for raw, begin in ahead(self._jobs(writer, origin, read_order(found, {file: specs})), pool):
                    begun = begin(raw)
                    write()  # of the piece before: a GPU goes on meanwhile
                    write = begun
                write()
            finishing.result()
            finishing = pool.submit(_finish, journal, file, running)
        finishing.result()
        origin.close()
        if len(shards) > 1:
            (folder / INDEX).write_text(index_json(shards))
        self.meter.say("weights written")

    def _jobs(self, writer: SafetensorsWriter, origin: Shards, names: Iterable[str]) -> Iterator[Job | None]:
        """The pieces of parameters, held up where a file is fetched or dropped."""
        for name in names:
            steady = origin.steady(name)
            if not steady:
                yield None
            with origin.reading(name):
                yield from self._pieces(writer, name)
                if not steady:
                    yield None

    def _pieces(self, writer: SafetensorsWriter, name: str) -> Iterator[Job]:
        parameter, spec = self.found[name], self.drawn.kept.get(name)
        if spec and parameter.stored and spec.dtype == parameter.stored.dtype:
            for read in self.found.pieces(name):
                yield read, partial(partial, self._copy, writer, name)
            return
        begin = partial(self._cast, writer, spec) if spec else partial(self._quantize, writer, name)
        count, width = parameter.matrix
        step = chunk_rows(width)
        for first in range(0, count, step):
            last = min(first + step, count)
            yield partial(self.found.raw_rows, name, first, last), partial(begin, first, last)

    def _quantize(self, writer: SafetensorsWriter, name: str, first: int, last: int, raw: Raw) -> Callable[[], None]:
        entry = self.drawn.modules[name.removesuffix(".weight")]
        rows = self.found.rows(name, first, last, raw)
        recipe = replace(self.recipe, group_size=entry.group_size, use_qjl=entry.qjl)
        part = quantize_weight(rows, recipe, entry.bits, entry.block)
        return partial(self._write_quantized, writer, name, first, last, rows, part)

    def _write_quantized(
        self, writer: SafetensorsWriter, name: str, first: int, last: int, rows: mx.array, part: QuantizedWeight
    ) -> None:
        path = name.removesuffix(".weight")
        scales = np.array(part.scales, np.float16)
        _check_scales(scales, rows, path)
        writer.write(name, part.packed)
        writer.write(f"{path}.scales", scales)
        if part.residual is not None:
            writer.write(f"{path}.qjl_signs", part.residual.signs)
            writer.write(f"{path}.qjl_norms", part.residual.norms)
        self._count(name, first, last, path)

    def _cast(self, writer: SafetensorsWriter, spec: TensorSpec, first: int, last: int, raw: Raw) -> Callable[[], None]:
        cast = cast_piece(self.found.rows(spec.name, first, last, raw), spec)
        return partial(self._write_cast, writer, spec.name, first, last, cast)

    def _write_cast(self, writer: SafetensorsWriter, name: str, first: int, last: int, cast: mx.array) -> None:
        writer.write(name, cast)
        self._count(name, first, last, name)

    def _copy(self, writer: SafetensorsWriter, name: str, raw: Raw) -> None:
        assert raw is not None
        writer.write(name, raw)
        self.meter.add(raw.nbytes, name)

    def _count(self, name: str, first: int, last: int, what: str) -> None:
        rows, nbytes = self.found[name].matrix[0], self.found[name].nbytes
        self.meter.add(nbytes * last // rows - nbytes * first // rows, what)


def _finish(journal: Journal, file: str, running: RunningHash) -> None:
    journal.add(file, running.finish())


def _check_scales(scales: NDArray[np.float16], rows: mx.array, path: str) -> None:
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
