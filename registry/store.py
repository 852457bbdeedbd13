"""The registry as callers see it."""

import uuid
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from registry.errors import RegistryError
from registry.files import Progress, compare, compare_sizes, describe, silent, sync
from registry.layout import Layout, absolute, check_name, overlap
from registry.likeness import differences
from registry.lock import locked
from registry.migrate import migrate
from registry.publishing import Publisher
from registry.query import MEASURED, Listing, find_model, require_model
from registry.records import (
    CacheComparisonRecord,
    EvaluationRecord,
    FileRecord,
    Model,
    ModelPage,
    ModelRecord,
    Recovery,
    Removal,
    SpeedRecord,
    Verification,
)
from registry.rows import AnyResult, ResultRow, now, to_model, to_result, to_result_row
from registry.session import Database
from registry.staging import slot
from registry.tables import (
    READY,
    AliasRow,
    CacheComparisonRow,
    EvaluationRow,
    LineageRow,
    ModelRow,
    SpeedRow,
    TagRow,
)


def open_registry(home: Path, url: str | None = None) -> "Registry":
    """Open, making what is missing, the registry of a home folder: bring its schema up to date (with a
    backup first), and finish or undo what a crash has cut short.

    `url` puts the database elsewhere, such as PostgreSQL; models stay under `home`. Raises
    RegistryError for a folder or database that cannot be used, and for a newer schema."""
    layout = Layout(home.expanduser().resolve())
    layout.create()
    database = Database(layout.database if url is None else url)
    publisher = Publisher(database, layout)
    try:
        with locked(layout.lock):
            migrate(database, layout.backups)
            recovered = publisher.recover()
    except BaseException:
        database.close()
        raise
    return Registry(layout, database, publisher, recovered)


class Registry:
    """Models and what was measured of them. Safe to use from several processes and threads at once.

    `recovered` is what opening had to do about a crash. Methods raise RegistryError for unknown names
    and values, in words for people; a name may be an alias, and its case does not matter."""

    def __init__(
        self, layout: Layout, database: Database, publisher: Publisher, recovered: tuple[Recovery, ...]
    ) -> None:
        self.home = layout.home
        self.models_root = layout.models
        self.recovered = recovered
        self._layout = layout
        self._database = database
        self._publisher = publisher

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._database.close()

    # Publishing

    def require_free(self, name: str, final: Path | None = None) -> Path:
        """The folder that a new model of this name will have; raises RegistryError where the name or
        the folder is taken. To be asked before work of hours, not after."""
        place = self._layout.final(name, final)
        with self._database.reading() as session:
            self._publisher.check_free(session, name, place)
        if place.exists() or place.is_symlink():
            raise RegistryError(f"{place} exists already. Choose another name or folder, or move it away.")
        return place

    def staging(
        self, name: str, final: Path | None = None, resumable: tuple[type[BaseException], ...] = ()
    ) -> AbstractContextManager[Path]:
        """A path, not existing yet, where the model may be made before it is published. What is left there or
        beside it is deleted at the end. After a kill, or an exception of the kinds `resumable`, the next staging of
        the same model finds what was beside it; that of any other model deletes it."""
        return slot(self._layout, self._layout.final(name, final), self._publisher.in_use, resumable)

    def publish(
        self,
        record: ModelRecord,
        staging: Path,
        final: Path | None = None,
        *,
        files: Sequence[FileRecord] | None = None,
        progress: Progress | None = None,
    ) -> Model:
        """Register a finished folder and move it to its place, both or neither.

        `final` is a folder of the user's choice outside the models root; equal to `staging`, the folder
        stays where it is. `files` saves hashing again: their names and sizes are checked, their hashes
        believed."""
        place, source = self._layout.final(record.name, final), absolute(staging)
        for tag in record.tags:
            check_name(tag, "a tag")
        if not source.is_dir() or source.is_symlink():
            raise RegistryError(f"{staging} is not a folder: the model's finished files should be there.")
        checked = describe(source, progress or silent) if files is None else _checked_files(source, files)
        sync(source)
        self._publisher.publish(replace(record, created_at=record.created_at or now()), source, place, checked)
        return self.get(record.name)

    # Reading

    def get(self, name: str) -> Model:
        """A model by name or alias; an unknown name's error lists the nearest."""
        with self._database.reading() as session:
            return self._models(session, [require_model(session, name)])[0]

    def find(self, name: str) -> Model | None:
        """As `get`, but None for an unknown name."""
        with self._database.reading() as session:
            row = find_model(session, name)
            return None if row is None else self._models(session, [row])[0]

    def overlapping(self, folder: Path) -> tuple[Model, ...]:
        """The models whose folder is this one, lies in it, or holds it."""
        place = absolute(folder)
        with self._database.reading() as session:
            stored = session.execute(select(ModelRow.id, ModelRow.path).where(ModelRow.state == READY)).all()
            ids = [model_id for model_id, path in stored if overlap(self._layout.path(path), place)]
            return self._models(session, session.scalars(select(ModelRow).where(ModelRow.id.in_(ids))).all())

    def models(
        self,
        filters: Sequence[str] = (),
        sort: str = "-created_at",
        limit: int = 50,
        cursor: str | None = None,
    ) -> ModelPage:
        """Models for which all filters hold (`filter_help` says how to write them), a page at a time;
        those without a value to sort by come last."""
        listing = Listing(tuple(filters), sort, limit, cursor)
        with self._database.reading() as session:
            found = session.execute(listing.page()).all()
            models = self._models(session, [found_row[0] for found_row in found[:limit]])
            last = found[limit - 1] if len(found) > limit else None
            return ModelPage(
                models=models,
                total=session.scalar(listing.count()) or 0,
                next_cursor=listing.next_cursor(last[1], last[0].id) if last else None,
                notices=_notices(models, sort.removeprefix("-")),
            )

    def evaluations(self, name: str) -> tuple[EvaluationRecord, ...]:
        """All evaluations of a model and its baselines, oldest first."""
        return self._results(name, EvaluationRow, EvaluationRecord)

    def speeds(self, name: str) -> tuple[SpeedRecord, ...]:
        return self._results(name, SpeedRow, SpeedRecord)

    def cache_comparisons(self, name: str) -> tuple[CacheComparisonRecord, ...]:
        return self._results(name, CacheComparisonRow, CacheComparisonRecord)

    def children(self, name: str) -> tuple[str, ...]:
        """Names of the registered models made from this one."""
        with self._database.reading() as session:
            parent = require_model(session, name)
            made = select(LineageRow.model_id).where(LineageRow.parent_id == parent.id)
            query = select(ModelRow.name).where(ModelRow.id.in_(made), ModelRow.state == READY)
            return tuple(session.scalars(query.order_by(ModelRow.name)))

    # Adding results

    def add_evaluation(self, name: str, *records: EvaluationRecord) -> None:
        """Record evaluations of a model, all or none."""
        self._add(name, EvaluationRow, records)

    def add_speed(self, name: str, *records: SpeedRecord) -> None:
        self._add(name, SpeedRow, records)

    def add_cache_comparison(self, name: str, *records: CacheComparisonRecord) -> None:
        """Record caches that were compared with each other: they get one `run`."""
        run = uuid.uuid4().hex
        self._add(name, CacheComparisonRow, [replace(record, run=record.run or run) for record in records])

    # Names

    def set_alias(self, alias: str, name: str) -> None:
        """Give a model another name; an alias that another model had moves over."""
        check_name(alias, "an alias")
        with self._database.writing() as session:
            model = require_model(session, name)
            key = alias.casefold()
            if taken := session.scalar(select(ModelRow.name).where(ModelRow.name_key == key)):
                raise RegistryError(f"The alias {alias!r} is already the name of the model {taken!r}.")
            session.execute(delete(AliasRow).where(AliasRow.alias_key == key))
            session.add(AliasRow(model_id=model.id, alias=alias, alias_key=key))

    def remove_alias(self, alias: str) -> None:
        with self._database.writing() as session:
            row = session.scalar(select(AliasRow).where(AliasRow.alias_key == alias.casefold()))
            if row is None:
                raise RegistryError(f"There is no alias {alias!r}. Show a model to see its aliases.")
            session.delete(row)

    def add_tags(self, name: str, *tags: str) -> None:
        for tag in tags:
            check_name(tag, "a tag")
        with self._database.writing() as session:
            model = require_model(session, name)
            present = {row.tag for row in model.tags}
            model.tags += [TagRow(tag=tag) for tag in dict.fromkeys(tags) if tag not in present]

    def remove_tags(self, name: str, *tags: str) -> None:
        with self._database.writing() as session:
            model = require_model(session, name)
            model.tags = [row for row in model.tags if row.tag not in tags]

    # Care

    def verify(self, name: str, progress: Progress | None = None) -> Verification:
        """Hash a model's files again: changed, missing and foreign files are found."""
        model = self.get(name)
        problems = compare(model.path, model.files, progress or silent)
        return Verification(
            name=model.name,
            path=model.path,
            files_checked=len(model.files),
            bytes_checked=model.size_bytes,
            problems=problems,
        )

    def remove(self, name: str, *, dry_run: bool = False, force: bool = False) -> Removal:
        """Delete a model's record, results and folder together; `dry_run` only says what would go.
        A folder that also holds foreign files is refused unless `force`."""
        return self._publisher.remove(name, dry_run=dry_run, force=force)

    def backup(self, target: Path | None = None) -> Path:
        """Copy the database (not the models) to a new file, checked; by default under HOME/backups."""
        stamp = f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}"
        place = absolute(target) if target else self._layout.backups / f"registry-{stamp}.sqlite"
        self._database.backup(place)
        return place

    # Within

    def _models(self, session: Session, rows: Sequence[ModelRow]) -> tuple[Model, ...]:
        ids = [row.id for row in rows]
        own = select(func.max(EvaluationRow.id)).where(EvaluationRow.baseline.is_(False))
        own = own.where(EvaluationRow.model_id.in_(ids)).group_by(EvaluationRow.model_id)
        timed = select(func.max(SpeedRow.id)).where(SpeedRow.generation_tokens_per_s.is_not(None))
        timed = timed.where(SpeedRow.model_id.in_(ids)).group_by(SpeedRow.model_id)
        evaluations = session.scalars(select(EvaluationRow).where(EvaluationRow.id.in_(own)))
        latest = {row.model_id: row for row in evaluations}
        speeds = {row.model_id: row for row in session.scalars(select(SpeedRow).where(SpeedRow.id.in_(timed)))}
        return tuple(to_model(row, self._layout.path(row.path), latest.get(row.id), speeds.get(row.id)) for row in rows)

    def _results(self, name: str, table: type[ResultRow], kind: type[AnyResult]) -> tuple[AnyResult, ...]:
        with self._database.reading() as session:
            model = require_model(session, name)
            rows = session.scalars(select(table).where(table.model_id == model.id).order_by(table.id))
            return tuple(to_result(kind, row) for row in rows)

    def _add(
        self,
        name: str,
        table: type[ResultRow],
        records: Iterable[EvaluationRecord | SpeedRecord | CacheComparisonRecord],
    ) -> None:
        with self._database.writing() as session:
            model = require_model(session, name)
            session.add_all(to_result_row(table, model.id, record) for record in records)


def _checked_files(folder: Path, files: Sequence[FileRecord]) -> Sequence[FileRecord]:
    problems = compare_sizes(folder, files)
    if problems or not files:
        wrong = ", ".join(f"{p.path} {p.kind} ({p.detail})" for p in problems[:3]) or "none were given"
        raise RegistryError(f"The files given are not those in {folder}: {wrong}. Convert it again.")
    return files


def _notices(models: Sequence[Model], sort: str) -> tuple[str, ...]:
    if sort not in MEASURED:
        return ()
    return differences(model.evaluation for model in models if model.evaluation)
