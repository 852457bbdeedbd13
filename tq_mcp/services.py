"""What tools and commands do: the only place where the engine and the registry meet."""

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quant_engine.allocation import allocate
from quant_engine.compare import DEFAULT_CACHES, compare_caches
from quant_engine.config import CacheConfig, QuantConfig
from quant_engine.convert import convert
from quant_engine.errors import DownloadError, InputError, OutputError, TurboQuantError
from quant_engine.evaluate import evaluate
from quant_engine.export import export
from quant_engine.generate import generate
from quant_engine.loader import load_source, load_tokenizer
from quant_engine.plan import plan as plan_sizes
from quant_engine.progress import Progress, silent
from quant_engine.sampling import Sampling
from quant_engine.source import Source, resolve
from quant_engine.text import load_text
from quant_engine.tokenizer_files import require_tokenizer
from registry import Model, Registry, open_registry, overlap
from tq_mcp import hub, records, schemas
from tq_mcp.loaded_model import LoadedModel
from tq_mcp.locate import Located, locate
from tq_mcp.settings import Settings

OnText = Callable[[str], None]

_log = logging.getLogger(__name__)

FULL_PRECISION = "full precision"


class Services:
    """All that can be done with models. Use it from one thread, but for `list_models` and `get_model`.

    `model` is everywhere a registry name, a folder or a Hub repository. Work raises TurboQuantError,
    KernelError or RegistryError, whose texts are for users; an exception from `progress` stops it, and nothing
    is left behind.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._loaded = LoadedModel()

    def convert(
        self,
        model: str,
        *,
        recipe: QuantConfig,
        name: str | None = None,
        output: Path | None = None,
        revision: str | None = None,
        dtype: str | None = None,
        keep_unfitting: bool = False,
        keep_source: bool = False,
        target_bpw: float | None = None,
        target_text: str | Path | None = None,
        progress: Progress = silent,
    ) -> schemas.Conversion:
        """Convert and register a model, both or neither; `output` None puts it under the models folder.

        keep_source: keep a repository's weights in Hugging Face's cache. target_bpw: give each layer bits and groups
        of its own, so that they average so many bits a weight; the weights are kept then, too. target_text: as
        `load_text` takes it, to measure on instead of text that the model writes.
        """
        if target_text is not None and target_bpw is None:
            raise InputError(
                f"target_text is {str(target_text)!r} and there is no target_bpw to share out by it; give target_bpw, "
                "or leave target_text out"
            )
        origin = locate(self._registry, model, revision)
        _require_tokenizer(origin)
        if target_bpw is not None:
            text = None if target_text is None else load_text(target_text)
            self._loaded.forget()
            source = resolve(origin.ref, revision=revision, progress=progress)
            recipe = allocate(source, recipe, target_bpw, keep_unfitting=keep_unfitting, text=text, progress=progress)
            revision = source.revision
        chosen = name or (output.name if output else records.default_name(origin, recipe))
        self._registry.require_free(chosen, output)
        self._loaded.forget()
        with self._registry.staging(chosen, output, resumable=(DownloadError, OutputError)) as staging:
            made = convert(
                origin.ref,
                staging,
                config=recipe,
                revision=revision,
                dtype=dtype,
                keep_unfitting=keep_unfitting,
                keep_source=keep_source,
                progress=progress,
            )
            record = records.model_record(chosen, made, origin)
            registered = self._registry.publish(record, staging, output, files=records.file_records(made))
        return records.conversion(registered, made)

    def export(
        self,
        model: str,
        output: Path,
        *,
        form: str = "float",
        bits: int | None = None,
        group_size: int | None = None,
        dtype: str = "bfloat16",
        overwrite: bool = False,
        progress: Progress = silent,
    ) -> schemas.Export:
        """Write a converted model to the folder `output` for plain mlx-lm; the result is not registered."""
        found = locate(self._registry, model)
        self._check_free(output.expanduser().resolve(), found)
        self._loaded.forget()
        made = export(
            found.ref,
            output,
            form=form,
            bits=bits,
            group_size=group_size,
            dtype=dtype,
            overwrite=overwrite,
            progress=progress,
        )
        return records.exported(found.name, made)

    def _check_free(self, output: Path, exported: Located) -> None:
        """Raise OutputError where `output` overlaps a registered model or what the exported one was made from."""
        for taken in self._registry.overlapping(output):
            raise OutputError(
                f"{output} overlaps {taken.path}, the registered model {taken.name}; choose another output"
            )
        origin = Path(exported.model.source) if exported.model else None
        if origin is not None and origin.is_absolute() and overlap(output, origin):
            raise OutputError(f"{output} overlaps {origin}, from which {exported.name} was made; choose another output")

    def open(self, model: str, settings: Mapping[str, Any] | None = None) -> tuple[Any, Any, dict[str, Any]]:
        """mlx-lm's model, its tokenizer with these settings for its own, and its config; not kept loaded here."""
        source = resolve(locate(self._registry, model).ref)
        return load_source(source), load_tokenizer(source, settings), dict(source.config)

    def generate(
        self,
        model: str,
        prompt: str,
        *,
        max_tokens: int = 256,
        sampling: Sampling | None = None,
        chat: bool | None = None,
        cache: CacheConfig | None = None,
        progress: Progress = silent,
        on_text: OnText | None = None,
    ) -> schemas.Generation:
        """Continue a prompt; the speed is recorded where the model is registered."""
        found = locate(self._registry, model)
        loaded, tokenizer = self._loaded.get(found.ref, progress)
        self._loaded.warm_up(prompt, [cache])
        made = generate(
            loaded,
            tokenizer,
            prompt,
            max_tokens=max_tokens,
            chat=chat,
            cache=cache,
            on_text=on_text,
            progress=progress,
            **asdict(sampling or Sampling()),
        )
        described = cache_name(cache)
        if found.model:
            self._registry.add_speed(found.model.name, records.speed_record(made, described))
        return records.generation(found.name, made, described)

    def evaluate(
        self,
        model: str,
        *,
        bits: Sequence[int] = (2, 3, 4),
        group_size: int = 64,
        text: str | Path | None = None,
        seq_len: int = 512,
        num_samples: int = 32,
        affine: bool = True,
        qjl: bool = True,
        revision: str | None = None,
        progress: Progress = silent,
    ) -> schemas.Evaluation:
        """Measure a float model and what each of `bits` would cost it, or a registered model as it is beside the
        float model that it was made from. Rows of a registered model are recorded."""
        found = locate(self._registry, model, revision)
        used = load_text(text)
        self._loaded.forget()
        original, notes = self._original(found, progress)
        report = evaluate(
            found.ref,
            bits=bits,
            group_size=group_size,
            text=used,
            seq_len=seq_len,
            num_samples=num_samples,
            affine=affine,
            qjl=qjl,
            reference=original.path if original else None,
            revision=revision,
            progress=progress,
        )
        if found.model:
            compared = found.model.source if original else None
            self._registry.add_evaluation(found.model.name, *records.evaluation_records(report, compared))
        return records.evaluation(found.name, report, [*notes, *report.notes])

    def compare_kv_cache(
        self,
        model: str,
        prompt: str,
        *,
        max_tokens: int = 64,
        caches: Sequence[CacheConfig] = DEFAULT_CACHES,
        chat: bool | None = None,
        progress: Progress = silent,
    ) -> schemas.CacheComparison:
        """Continue a prompt with a full-precision cache and with each of `caches`; recorded where registered."""
        found = locate(self._registry, model)
        loaded, tokenizer = self._loaded.get(found.ref, progress)
        self._loaded.warm_up(prompt, [None, *caches])
        report = compare_caches(
            loaded, tokenizer, prompt, max_tokens=max_tokens, caches=caches, chat=chat, progress=progress
        )
        if found.model:
            rows = records.cache_records(report, prompt, max_tokens, caches)
            self._registry.add_cache_comparison(found.model.name, *rows)
        return records.cache_comparison(found.name, report)

    def plan(
        self,
        model: str,
        *,
        bits: Sequence[int] = (2, 3, 4),
        group_size: int = 64,
        context: int = 4096,
        use_qjl: bool = False,
        fold_rotation: bool = False,
        widths: Mapping[str, Any] | None = None,
        keep_unfitting: bool = False,
        revision: str | None = None,
        progress: Progress = silent,
    ) -> schemas.Plan:
        """What converting would give, from headers only."""
        origin = locate(self._registry, model, revision)
        _require_tokenizer(origin)
        found = plan_sizes(
            origin.ref,
            bits=bits,
            group_size=group_size,
            context=context,
            use_qjl=use_qjl,
            fold_rotation=fold_rotation,
            widths=widths,
            keep_unfitting=keep_unfitting,
            revision=revision,
            progress=progress,
        )
        return records.plan(found)

    def push(self, name: str, repo: str, *, private: bool = False, dry_run: bool = True) -> schemas.Push:
        """Upload a registered model with a card that holds its measurements; a dry run only says what would go.

        Only the model's own files go, and only while they are as they were registered.
        """
        hub.check_repo(repo)
        found = self._registry.get(name)
        folder = Path(found.path)
        if damaged := [p for p in self._registry.verify(name).problems if p.kind != "foreign"]:
            wrong = ", ".join(f"{p.path} {p.kind}" for p in damaged[:3])
            raise OutputError(f"{found.name} is not what was registered ({wrong}); convert it again before uploading")
        written = (folder / hub.CARD).read_text() if (folder / hub.CARD).is_file() else f"# {found.name}\n"
        card = hub.card_with_measurements(written, self._registry.evaluations(found.name))
        files = [file.path for file in found.files if file.path != hub.CARD]
        url = None if dry_run else hub.upload(folder, files, card, repo, private=private)
        return schemas.Push(
            name=found.name,
            repo=repo,
            dry_run=dry_run,
            url=url,
            files=files,
            size_bytes=sum(file.size_bytes for file in found.files if file.path != hub.CARD),
            card=card,
        )

    def list_models(
        self,
        filters: Sequence[str] = (),
        sort: str = "-created_at",
        limit: int = 50,
        cursor: str | None = None,
    ) -> schemas.ModelList:
        """A page of the registry."""
        page = self._registry.models(filters, sort, limit, cursor)
        return schemas.ModelList(
            models=[schemas.ModelSummary(**records.summary(model)) for model in page.models],
            total=page.total,
            next_cursor=page.next_cursor,
            notices=list(page.notices),
        )

    def get_model(self, name: str) -> schemas.ModelDetails:
        """All about a registered model."""
        found = self._registry.get(name)
        return records.details(
            found,
            self._registry.evaluations(found.name),
            self._registry.speeds(found.name),
            self._registry.cache_comparisons(found.name),
            self._registry.children(found.name),
        )

    def verify_model(self, name: str, progress: Progress = silent) -> schemas.Verification:
        """Hash a registered model's files again: what changed, is missing, or is not its own."""
        found = self._registry.verify(name, progress)
        problems = [schemas.FileProblem.model_validate(problem) for problem in found.problems]
        return schemas.Verification(
            name=found.name,
            path=str(found.path),
            intact=found.ok,
            files_checked=found.files_checked,
            bytes_checked=found.bytes_checked,
            problems=problems,
        )

    def remove_model(self, name: str, *, force: bool = False, dry_run: bool = True) -> schemas.Removal:
        """Take a model out of the registry and delete its files; a dry run only says what would go.

        force: also files in its folder that are not the model's.
        """
        if not dry_run:
            self._loaded.forget()
        found = self._registry.remove(name, force=force, dry_run=dry_run)
        return schemas.Removal(
            name=found.name,
            path=str(found.path),
            dry_run=dry_run,
            files=found.files,
            size_bytes=found.size_bytes,
            foreign=list(found.foreign),
        )

    def _original(self, found: Located, progress: Progress) -> tuple[Source | None, list[str]]:
        """The float model that a registered one was made from, and a note where it cannot be had."""
        if found.model is None:
            return None, []
        source = found.model.source
        try:
            origin = resolve(source, revision=found.model.source_revision, progress=progress)
        except TurboQuantError as error:
            return None, [f"no float and affine rows: the original {source} cannot be read ({error})"]
        if not _unchanged(origin, found.model):
            return None, [f"no float and affine rows: {source} has changed since the conversion"]
        return origin, []


@contextmanager
def open_services(settings: Settings) -> Generator[Services]:
    """Services on the registry of the home folder."""
    with open_registry(settings.home) as registry:
        for found in registry.recovered:
            _log.warning("%s was %s after a crash: %s", found.name, found.action, found.detail)
        yield Services(registry)


def cache_name(cache: CacheConfig | None) -> str:
    """A cache in words."""
    return FULL_PRECISION if cache is None else cache.title


def cache_configs(
    tq_bits: Sequence[int] | None = None, k_bits: int | None = None, v_bits: int | None = None, group_size: int = 64
) -> list[CacheConfig]:
    """The caches that options ask for: equal bits for keys and values, a pair of both, or the usual ones."""
    equal = [CacheConfig(bits, bits, group_size) for bits in tq_bits or ()]
    default = CacheConfig()
    if k_bits is not None or v_bits is not None:
        pair = CacheConfig(k_bits or default.k_bits, v_bits or default.v_bits, group_size)
        return [*equal, pair]
    return equal or [CacheConfig(c.k_bits, c.v_bits, group_size) for c in DEFAULT_CACHES]


def _require_tokenizer(origin: Located) -> None:
    """Raise SourceError for a model's folder without a tokenizer; a repository shows it when it is loaded."""
    if isinstance(origin.ref, Path):
        require_tokenizer(resolve(origin.ref).path)


def _unchanged(origin: Source, model: Model) -> bool:
    if origin.repo is not None:
        return origin.revision == model.source_revision
    return origin.content_sha256 == model.source_sha256
