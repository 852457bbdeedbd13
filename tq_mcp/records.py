"""Between what the engine measures, what the registry keeps, and what tools and commands answer."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quant_engine.compare import CacheReport
from quant_engine.config import CacheConfig, QuantConfig
from quant_engine.convert import ConversionResult
from quant_engine.evaluate import EvaluationReport
from quant_engine.export import ExportResult
from quant_engine.generate import GenerationResult
from quant_engine.manifest import FORMAT_VERSION, tool_versions
from quant_engine.model_card import licence
from quant_engine.plan import Plan
from quant_engine.source import read_json
from registry import (
    CacheComparisonRecord,
    EvaluationRecord,
    FileRecord,
    Model,
    ModelRecord,
    Parent,
    SpeedRecord,
)
from tq_mcp import machine, schemas
from tq_mcp.locate import Located
from tq_mcp.untrusted import clean

NEWEST = 20
"""Entries of each kind that one model's details show."""


def model_record(name: str, made: ConversionResult, origin: Located) -> ModelRecord:
    """The row of a model that was just converted into the folder `made.path`."""
    revision, content = made.source["revision"], made.source["content_sha256"]
    terms = licence(made.path / "README.md")
    return ModelRecord(
        name=name,
        source=origin.source,
        source_sha256=content or _commit_sha256(origin.source, revision),
        source_repository=origin.source if content is None else None,
        source_revision=revision,
        source_size_bytes=made.source_size_bytes,
        architecture=str(read_json(made.path / "config.json")["model_type"]),
        parameters=made.parameters,
        quantized_parameters=made.quantized_parameters,
        licence=terms.get("license_name") or terms.get("license"),
        method="turboquant+qjl" if made.config.use_qjl else "turboquant",
        bits=made.config.bits,
        group_size=made.config.group_size,
        bits_per_weight=made.bits_per_weight,
        seed=made.config.seed,
        recipe=made.config.to_dict(),
        format_version=FORMAT_VERSION,
        versions=tool_versions(),
        hardware=machine.describe(),
        seconds=made.seconds,
        peak_memory_bytes=made.peak_memory_bytes,
        parents=(Parent(name=origin.model.name if origin.model else origin.source),),
    )


def _commit_sha256(repository: str, commit: str | None) -> str:
    """A repository's commit names its content, so its hash stands for the content's."""
    return hashlib.sha256(f"{repository}@{commit}".encode()).hexdigest()


def file_records(made: ConversionResult) -> list[FileRecord]:
    return [FileRecord(path=file.name, size_bytes=file.size_bytes, sha256=file.sha256) for file in made.files]


def conversion(model: Model, made: ConversionResult) -> schemas.Conversion:
    return schemas.Conversion(
        name=model.name,
        path=str(model.path),
        source=model.source,
        source_revision=model.source_revision,
        bits=made.config.bits,
        group_size=made.config.group_size,
        rotation=made.config.rotation,
        fold_rotation=made.config.fold_rotation,
        use_qjl=made.config.use_qjl,
        bits_per_weight=made.bits_per_weight,
        size_bytes=made.size_bytes,
        source_size_bytes=made.source_size_bytes,
        compression=made.source_size_bytes / made.size_bytes,
        parameters=made.parameters,
        quantized_parameters=made.quantized_parameters,
        modules=made.modules,
        excluded=count_reasons(made.excluded),
        seconds=made.seconds,
        peak_memory_bytes=made.peak_memory_bytes,
    )


def exported(model: str, made: ExportResult) -> schemas.Export:
    return schemas.Export(
        model=model,
        path=str(made.path),
        form=made.form,
        bits=made.bits,
        group_size=made.group_size,
        dtype=made.dtype,
        bits_per_weight=made.bits_per_weight,
        size_bytes=made.size_bytes,
        files=[file.name for file in made.files],
        seconds=made.seconds,
    )


def count_reasons(excluded: Mapping[str, str]) -> dict[str, int]:
    """How many modules share each reason, the most common first."""
    return dict(Counter(excluded.values()).most_common())


def generation(model: str, made: GenerationResult, cache: str) -> schemas.Generation:
    return schemas.Generation(
        model=model,
        text=clean(made.text),
        finish_reason=made.finish_reason,
        prompt_tokens=made.prompt_tokens,
        generation_tokens=made.generation_tokens,
        prompt_tokens_per_s=made.prompt_tokens_per_s,
        generation_tokens_per_s=made.generation_tokens_per_s,
        peak_memory_bytes=made.peak_memory_bytes,
        cache=cache,
        cache_bytes=made.cache_bytes,
        backend=made.backend,
        kernel_path=made.kernel_path,
    )


def speed_record(made: GenerationResult, cache: str) -> SpeedRecord:
    return SpeedRecord(
        device=machine.describe(),
        backend=made.backend,
        kernel_path=made.kernel_path,
        prompt_tokens=made.prompt_tokens,
        generation_tokens=made.generation_tokens,
        prompt_tokens_per_s=made.prompt_tokens_per_s,
        generation_tokens_per_s=made.generation_tokens_per_s,
        context_tokens=made.prompt_tokens + made.generation_tokens,
        peak_memory_bytes=made.peak_memory_bytes,
        cache=cache,
        cache_bytes=made.cache_bytes,
    )


def evaluation(model: str, report: EvaluationReport, notes: list[str]) -> schemas.Evaluation:
    return schemas.Evaluation.model_validate({**report.to_dict(), "model": model, "notes": notes})


def evaluation_records(report: EvaluationReport, reference: str | None) -> list[EvaluationRecord]:
    """Rows of a converted model's report: the float and affine ones are baselines."""
    device = machine.describe()
    return [
        EvaluationRecord(
            dataset=report.text_name,
            dataset_sha256=report.text_sha256,
            windows=report.num_samples,
            seq_len=report.seq_len,
            tokens=report.tokens,
            method=row.method,
            baseline=row.method in ("float", "affine"),
            bits=row.bits,
            group_size=row.group_size,
            bits_per_weight=row.bits_per_weight,
            size_bytes=row.size_bytes,
            ppl=row.ppl,
            ppl_stderr=row.ppl_stderr,
            kl=row.kl,
            top1=row.top1,
            reference=reference,
            device=device,
            backend=row.backend,
            kernel_path=row.kernel_path,
        )
        for row in report.rows
    ]


def cache_comparison(model: str, report: CacheReport) -> schemas.CacheComparison:
    rows = [{**row, "text": clean(row["text"], 4_000)} for row in report.to_dict()["rows"]]
    return schemas.CacheComparison.model_validate({**report.to_dict(), "rows": rows, "model": model})


def cache_records(
    report: CacheReport, prompt: str, max_tokens: int, caches: Sequence[CacheConfig]
) -> list[CacheComparisonRecord]:
    """Rows of one comparison; the first is full precision, then those of `caches`."""
    device, digest = machine.describe(), hashlib.sha256(prompt.encode()).hexdigest()
    groups = [None, *(cache.group_size for cache in caches)]
    return [
        CacheComparisonRecord(
            cache=row.cache,
            k_bits=row.k_bits,
            v_bits=row.v_bits,
            group_size=group_size,
            prompt_tokens=report.prompt_tokens,
            max_tokens=max_tokens,
            prompt_sha256=digest,
            cache_bytes=row.cache_bytes,
            compression=row.compression,
            tokens_per_s=row.tokens_per_s,
            kl=row.kl,
            top1=row.top1,
            text=clean(row.text, 4_000),
            device=device,
            backend=row.backend,
            kernel_path=row.kernel_path,
        )
        for row, group_size in zip(report.rows, groups, strict=True)
    ]


def plan(found: Plan) -> schemas.Plan:
    return schemas.Plan.model_validate({**found.to_dict(), "excluded": count_reasons(found.excluded)})


def summary(model: Model) -> dict[str, Any]:
    """The fields of a `ModelSummary`."""
    own = {name: getattr(model, name) for name in schemas.ModelSummary.model_fields if hasattr(model, name)}
    return {
        **own,
        "path": str(model.path),
        "ppl": model.evaluation.ppl if model.evaluation else None,
        "ppl_text": model.evaluation.dataset if model.evaluation else None,
        "generation_tokens_per_s": model.speed.generation_tokens_per_s if model.speed else None,
        "aliases": list(model.aliases),
        "tags": list(model.tags),
    }


def details(
    model: Model,
    evaluations: tuple[EvaluationRecord, ...],
    speeds: tuple[SpeedRecord, ...],
    caches: tuple[CacheComparisonRecord, ...],
    children: tuple[str, ...],
) -> schemas.ModelDetails:
    return schemas.ModelDetails(
        **summary(model),
        recipe=dict(model.recipe),
        source_sha256=model.source_sha256,
        source_size_bytes=model.source_size_bytes,
        quantized_parameters=model.quantized_parameters,
        licence=clean(model.licence, 200) if model.licence else None,
        versions=dict(model.versions),
        hardware=model.hardware,
        seconds=model.seconds,
        peak_memory_bytes=model.peak_memory_bytes,
        external=model.external,
        files=[schemas.ModelFile.model_validate(file) for file in model.files],
        children=list(children),
        evaluations=[schemas.EvaluationEntry.model_validate(record) for record in evaluations[-NEWEST:]],
        speeds=[schemas.SpeedEntry.model_validate(record) for record in speeds[-NEWEST:]],
        cache_comparisons=[schemas.CacheEntry.model_validate(record) for record in caches[-NEWEST:]],
    )


def default_name(origin: Located, recipe: QuantConfig) -> str:
    """A registry name such as qwen2.5-0.5b-tq3-g64; widths of single modules add a mark of their own."""
    base = Path(origin.name).name
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in base).strip("._-") or "model"
    plain = QuantConfig(bits=recipe.bits, group_size=recipe.group_size, use_qjl=recipe.use_qjl)
    changed = {name: value for name, value in recipe.to_dict().items() if value != plain.to_dict()[name]}
    mark = hashlib.sha256(repr(sorted(changed.items())).encode()).hexdigest()[:6] if changed else ""
    parts = [f"{kept[:70]}-tq{recipe.bits}-g{recipe.group_size}", "qjl" if recipe.use_qjl else "", mark]
    return "-".join(part for part in parts if part)
