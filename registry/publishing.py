"""Models appear and disappear here, each row together with its folder.

A database's commit and a folder's rename cannot be one step, so both go through a third state that
readers do not see:

    publish    row "publishing" -> rename staging to final  -> row "ready"
    remove     row "removing"   -> rename final to trash -> delete trash -> delete row

All of it happens under the registry's lock, so an unfinished row seen by whoever holds the lock was
left by a crash, and where the folder is tells how far it had come. `recover` then goes on from there;
it runs when a registry is opened and before each publish and removal.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from registry.errors import RegistryError
from registry.files import compare_sizes, list_files, sync_entry
from registry.layout import Layout, overlap
from registry.lock import locked
from registry.query import ready_id, require_model
from registry.records import FileRecord, ModelRecord, Recovery, Removal
from registry.rows import to_model_row
from registry.session import Database
from registry.staging import discard, sweep, trash
from registry.tables import PUBLISHING, READY, REMOVING, AliasRow, ModelRow


@dataclass(frozen=True)
class Unfinished:
    """What a crash left, apart from any session. `staging` is the trash of a removal."""

    id: int
    name: str
    state: str
    final: Path
    staging: Path
    files: tuple[FileRecord, ...]


@dataclass(frozen=True)
class Publisher:
    database: Database
    layout: Layout

    def publish(self, record: ModelRecord, staging: Path, final: Path, files: Sequence[FileRecord]) -> None:
        """`staging` is complete and on the disk; `final` and `staging` are absolute."""
        with locked(self.layout.lock):
            self.recover()
            in_place = staging == final
            model_id = self._insert(record, final, None if in_place else staging, files)
            if not in_place:
                self._move_in(self._unfinished(model_id)[0])

    def remove(self, name: str, *, dry_run: bool, force: bool) -> Removal:
        """Raises RegistryError for an unknown name, and for foreign files unless `force`."""
        with locked(self.layout.lock):
            self.recover()
            model_id, removal = self._plan_removal(name, dry_run)
            if dry_run:
                return removal
            if removal.foreign and not force:
                raise RegistryError(
                    f"The folder {removal.path} also holds files that are not the model's: "
                    f"{', '.join(removal.foreign[:5])}. Move them away, or remove with force."
                )
            self._set_state(model_id, REMOVING, self.layout.stored(trash(self.layout, removal.path)))
            self._move_out(self._unfinished(model_id)[0])
        return removal

    def recover(self) -> tuple[Recovery, ...]:
        """Finish or undo what crashes left of publishing and removing, and delete the slots that are empty then;
        models that were being made stay for `staging.slot`. Needs the lock."""
        done = tuple(self._resolve(item) for item in self._unfinished())
        sweep(self.layout, self.in_use(), unfinished=False)
        return done

    def in_use(self) -> tuple[Path, ...]:
        """The folders in slots that belong to a row. Needs the lock."""
        return tuple(item.staging for item in self._unfinished())

    def check_free(self, session: Session, name: str, final: Path) -> None:
        """Raises RegistryError where the name or the place is taken."""
        key = name.casefold()
        taken = session.scalar(select(ModelRow.name).where(ModelRow.name_key == key))
        alias = session.scalar(select(AliasRow.alias).where(AliasRow.alias_key == key))
        if taken:
            remove = f"remove that one: tq-mcp models rm {taken}"
            raise RegistryError(f"The name {name!r} is taken by the model {taken!r}. Choose another, or {remove}.")
        if alias:
            raise RegistryError(f"The name {name!r} is taken by the alias {alias!r}. Choose another.")
        for stored, owner in session.execute(select(ModelRow.path, ModelRow.name)):
            place = self.layout.path(stored)
            if overlap(final, place):
                raise RegistryError(f"{final} overlaps {place}, where the model {owner!r} is. Choose another.")

    def _insert(self, record: ModelRecord, final: Path, staging: Path | None, files: Sequence[FileRecord]) -> int:
        row = to_model_row(record, self.layout.stored(final), self.layout.is_external(final), files)
        row.state = READY if staging is None else PUBLISHING
        row.staging_path = None if staging is None else self.layout.stored(staging)
        with self.database.writing(durable=True) as session:
            self.check_free(session, record.name, final)
            if staging is not None and os.path.lexists(final):
                raise RegistryError(f"{final} exists already. Choose another name or folder, or move it away.")
            for parent in row.parents:
                parent.parent_id = session.scalar(ready_id(parent.name))
            session.add(row)
            session.flush()
            return row.id

    def _move_in(self, item: Unfinished) -> None:
        try:
            item.final.parent.mkdir(parents=True, exist_ok=True)
            item.staging.rename(item.final)
        except OSError as error:
            self._delete_row(item.id)
            raise RegistryError(
                f"{item.staging} cannot become {item.final}: {error.strerror}. Nothing was registered; "
                "both must be on one file system, and the folder above must be writable."
            ) from error
        self._settle(item)

    def _settle(self, item: Unfinished) -> None:
        sync_entry(item.final.parent)
        self._set_state(item.id, READY, None)

    def _move_out(self, item: Unfinished) -> None:
        try:
            if not os.path.lexists(item.staging) and os.path.lexists(item.final):
                item.final.rename(item.staging)
        except OSError as error:
            self._set_state(item.id, READY, None)
            raise RegistryError(f"{item.final} cannot be removed: {error.strerror}.") from error
        discard(item.staging)
        if os.path.lexists(item.staging):
            raise RegistryError(
                f"Not all of the model {item.name!r} could be deleted; the rest is in {item.staging}, and "
                "is tried again when the registry is opened."
            )
        self._delete_row(item.id)

    def _resolve(self, item: Unfinished) -> Recovery:
        if not item.final.parent.is_dir() and not item.staging.parent.is_dir():
            detail = f"{item.final.parent} is not there; is its disk connected?"
            return Recovery(name=item.name, action="left", detail=detail)
        try:
            if item.state == REMOVING:
                self._move_out(item)
                return Recovery(name=item.name, action="removed", detail=f"{item.final} is gone")
            return self._resolve_publish(item)
        except (OSError, RegistryError) as error:
            return Recovery(name=item.name, action="left", detail=str(error))

    def _resolve_publish(self, item: Unfinished) -> Recovery:
        staged, moved = os.path.lexists(item.staging), os.path.lexists(item.final)
        if staged == moved or (staged and compare_sizes(item.staging, item.files)):
            discard(item.staging)
            self._delete_row(item.id)
            return Recovery(name=item.name, action="rolled back", detail="its files were not whole")
        if staged:
            self._move_in(item)
        else:
            self._settle(item)
        return Recovery(name=item.name, action="published", detail=f"its files are in {item.final}")

    def _plan_removal(self, name: str, dry_run: bool) -> tuple[int, Removal]:
        with self.database.reading() as session:
            # Also what recovery had to leave: a publish to a disk that will not come back.
            row = require_model(session, name, any_state=True)
            path, known = self.layout.path(row.path), {file.path for file in row.files}
            foreign = tuple(file for file in list_files(path) if file not in known)
            size = row.size_bytes
            return row.id, Removal(
                name=row.name, path=path, files=len(known), size_bytes=size, foreign=foreign, dry_run=dry_run
            )

    def _unfinished(self, model_id: int | None = None) -> tuple[Unfinished, ...]:
        query = select(ModelRow).where(ModelRow.state != READY).order_by(ModelRow.id)
        if model_id is not None:
            query = query.where(ModelRow.id == model_id)
        with self.database.reading() as session:
            return tuple(self._detached(row) for row in session.scalars(query))

    def _detached(self, row: ModelRow) -> Unfinished:
        return Unfinished(
            id=row.id,
            name=row.name,
            state=row.state,
            final=self.layout.path(row.path),
            staging=self.layout.path(row.staging_path or row.path),
            files=tuple(FileRecord(path=f.path, size_bytes=f.size_bytes, sha256=f.sha256) for f in row.files),
        )

    def _set_state(self, model_id: int, state: str, staging_path: str | None) -> None:
        with self.database.writing(durable=True) as session:
            session.execute(
                update(ModelRow).where(ModelRow.id == model_id).values(state=state, staging_path=staging_path)
            )

    def _delete_row(self, model_id: int) -> None:
        with self.database.writing(durable=True) as session:
            session.execute(delete(ModelRow).where(ModelRow.id == model_id))
