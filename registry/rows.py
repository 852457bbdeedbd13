"""Between records (what callers see) and rows (what is stored)."""

import math
from collections.abc import Iterable
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from registry.errors import RegistryError
from registry.records import (
    CacheComparisonRecord,
    EvaluationRecord,
    FileRecord,
    Model,
    ModelRecord,
    Parent,
    SpeedRecord,
    recipe_sha256,
)
from registry.tables import (
    CacheComparisonRow,
    EvaluationRow,
    FileRow,
    LineageRow,
    ModelRow,
    SpeedRow,
    TagRow,
)

Result = EvaluationRecord | SpeedRecord | CacheComparisonRecord
ResultRow = EvaluationRow | SpeedRow | CacheComparisonRow
AnyResult = TypeVar("AnyResult", EvaluationRecord, SpeedRecord, CacheComparisonRecord)

RELATED = frozenset({"files", "parents", "aliases", "tags", "evaluation", "speed"})


def now() -> datetime:
    return datetime.now(UTC)


def to_model_row(record: ModelRecord, path: str, external: bool, files: Iterable[FileRecord]) -> ModelRow:
    """A row without its state. Raises RegistryError for values that cannot be stored."""
    values = _checked(record)
    for name in RELATED:
        values.pop(name, None)
    file_rows = [FileRow(path=f.path, size_bytes=f.size_bytes, sha256=f.sha256) for f in files]
    return ModelRow(
        **values,
        name_key=record.name.casefold(),
        path=path,
        external=external,
        recipe_sha256=recipe_sha256(record.recipe),
        size_bytes=sum(row.size_bytes for row in file_rows),
        files=file_rows,
        parents=[LineageRow(name=parent.name, relation=parent.relation) for parent in record.parents],
        tags=[TagRow(tag=tag) for tag in sorted(set(record.tags))],
    )


def to_model(
    row: ModelRow, path: Path, evaluation: EvaluationRow | None = None, speed: SpeedRow | None = None
) -> Model:
    plain = {f.name: getattr(row, f.name) for f in fields(Model) if f.name not in {*RELATED, "path"}}
    return Model(
        **plain,
        path=path,
        files=tuple(FileRecord(path=f.path, size_bytes=f.size_bytes, sha256=f.sha256) for f in row.files),
        parents=tuple(Parent(name=parent.name, relation=parent.relation) for parent in row.parents),
        aliases=tuple(alias.alias for alias in row.aliases),
        tags=tuple(tag.tag for tag in row.tags),
        evaluation=to_result(EvaluationRecord, evaluation) if evaluation else None,
        speed=to_result(SpeedRecord, speed) if speed else None,
    )


def to_result_row(kind: type[ResultRow], model_id: int, record: Result) -> ResultRow:
    """Raises RegistryError for numbers that are not finite."""
    return kind(model_id=model_id, **_checked(record))


def to_result(kind: type[AnyResult], row: ResultRow) -> AnyResult:
    return kind(**{f.name: getattr(row, f.name) for f in fields(kind)})


def _checked(record: ModelRecord | Result) -> dict[str, Any]:
    dated = replace(record, created_at=record.created_at or now())
    values: dict[str, Any] = {f.name: getattr(dated, f.name) for f in fields(dated)}
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise RegistryError(f"{name} is {value}; only finite numbers are recorded.")
        if isinstance(value, datetime) and value.tzinfo is None:
            raise RegistryError(f"{name} {value} has no time zone. Give an aware datetime, best in UTC.")
    return values
