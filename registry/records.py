"""What goes into the registry and comes out of it: frozen dataclasses, free of SQL.

Units are in the names: `_bytes`, `seconds`, `_per_s`; `bits_per_weight` is measured from bytes on disk.
Times are aware datetimes in UTC. A `created_at` of None is filled in with the present when it is stored.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from registry.errors import RegistryError

ProblemKind = Literal["changed", "missing", "foreign"]


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """One file of a model: `path` is relative to the model's folder, with forward slashes."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Parent:
    """What a model was made from: a registered model's name, or any other reference."""

    name: str
    relation: str = "quantized"


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """Quality on one text. `baseline` marks a row that measures what the model is compared with
    (float, affine) and not the model itself; `reference` names what kl and top1 are taken against."""

    dataset: str
    dataset_sha256: str
    method: str
    ppl: float
    windows: int
    seq_len: int
    tokens: int
    ppl_stderr: float | None = None
    kl: float | None = None
    top1: float | None = None
    reference: str | None = None
    bits: int | None = None
    group_size: int | None = None
    bits_per_weight: float | None = None
    size_bytes: int | None = None
    baseline: bool = False
    device: str = ""
    backend: str = ""
    kernel_path: str = ""
    created_at: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class SpeedRecord:
    """Speed of one generation: `context_tokens` were in the cache when it ended. A speed is None where there was
    nothing to measure it by."""

    device: str
    backend: str
    kernel_path: str
    prompt_tokens: int
    generation_tokens: int
    prompt_tokens_per_s: float | None
    generation_tokens_per_s: float | None
    context_tokens: int | None = None
    peak_memory_bytes: int | None = None
    cache: str = ""
    cache_bytes: int | None = None
    created_at: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class CacheComparisonRecord:
    """One key-value cache on one prompt. Rows of one comparison share a `run`, which the registry
    sets when they are added together; `compression` is full precision's bytes over these."""

    cache: str
    prompt_tokens: int
    max_tokens: int
    cache_bytes: int
    compression: float
    tokens_per_s: float | None
    k_bits: int | None = None
    v_bits: int | None = None
    group_size: int | None = None
    kl: float | None = None
    top1: float | None = None
    prompt_sha256: str = ""
    text: str = ""
    device: str = ""
    backend: str = ""
    kernel_path: str = ""
    run: str = ""
    created_at: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """A model to publish. `source` is what the user named, `source_sha256` hashes its content;
    `bits` is the nominal width (None: not quantized); `versions` maps tool and libraries to versions."""

    name: str
    source: str
    source_sha256: str
    architecture: str
    parameters: int
    bits_per_weight: float
    recipe: Mapping[str, Any]
    method: str = "turboquant"
    bits: int | None = None
    group_size: int | None = None
    seed: int = 0
    format_version: int = 1
    source_repository: str | None = None
    source_revision: str | None = None
    source_size_bytes: int | None = None
    quantized_parameters: int | None = None
    licence: str | None = None
    versions: Mapping[str, str]
    hardware: str = ""
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    parents: tuple[Parent, ...] = ()
    tags: tuple[str, ...] = ()
    created_at: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class Model(ModelRecord):
    """A published model. `size_bytes` is the sum of its files; `external` means that `path` was
    chosen by the user and lies outside the models root; `evaluation` and `speed` are the latest of
    the model itself, `speed` of those with a measured speed of generation."""

    path: Path
    external: bool
    recipe_sha256: str
    size_bytes: int
    files: tuple[FileRecord, ...]
    aliases: tuple[str, ...] = ()
    evaluation: EvaluationRecord | None = None
    speed: SpeedRecord | None = None


@dataclass(frozen=True, kw_only=True)
class ModelPage:
    """One page of a listing: `total` counts all pages, `next_cursor` is None on the last one, and
    `notices` says where the sorted numbers were not measured alike."""

    models: tuple[Model, ...]
    total: int
    next_cursor: str | None
    notices: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is wrong with one file: "changed" bytes, "missing", or "foreign" (not of this model)."""

    kind: ProblemKind
    path: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The result of hashing a model's files again."""

    name: str
    path: Path
    files_checked: int
    bytes_checked: int
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


@dataclass(frozen=True, kw_only=True)
class Removal:
    """What was removed, or with `dry_run` would be; `foreign` are files of the folder that are not the
    model's own."""

    name: str
    path: Path
    files: int
    size_bytes: int
    foreign: tuple[str, ...]
    dry_run: bool


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What opening the registry did about a publish or removal that a crash had cut short."""

    name: str
    action: Literal["published", "rolled back", "removed", "left"]
    detail: str


def recipe_sha256(recipe: Mapping[str, Any]) -> str:
    """SHA-256 of the recipe's canonical JSON (sorted keys, no spaces): equal recipes, equal hashes."""
    try:
        text = json.dumps(recipe, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RegistryError(f"The recipe cannot be written as JSON: {error}. Use plain values.") from error
    return hashlib.sha256(text.encode()).hexdigest()
