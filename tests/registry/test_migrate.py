"""Schemas: made, brought up to date after a backup, and refused when newer."""

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable

from registry import Model, Registry, RegistryError, SpeedRecord, open_registry
from registry.migrate import SCRIPTS, migrate
from registry.session import Database
from registry.tables import Base

NEXT = '''
"""A later schema: batch mode rebuilds the table of models, which others refer to."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    with op.batch_alter_table("models", recreate="always") as batch:
        batch.add_column(sa.Column("note", sa.Text(), nullable=True))
    FAIL
'''


def later_scripts(folder: Path, fail: str = "") -> Path:
    scripts = folder / "100% later"
    shutil.copytree(SCRIPTS, scripts)
    (scripts / "versions" / "0003_note.py").write_text(NEXT.replace("FAIL", fail or "pass"))
    return scripts


def revision(home: Path) -> str:
    with closing(sqlite3.connect(home / "registry.sqlite")) as raw:
        return raw.execute("SELECT version_num FROM alembic_version").fetchone()[0]


@pytest.fixture
def database(home: Path, registry: Registry, publish: Callable[..., Model]) -> Iterator[Database]:
    publish(tags=("kept",))
    opened = Database(home / "registry.sqlite")
    yield opened
    opened.close()


def test_the_migrations_make_what_the_tables_say(home: Path, registry: Registry) -> None:
    engine = create_engine(f"sqlite:///{home / 'registry.sqlite'}")
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
    engine.dispose()


def test_every_table_can_be_made_in_postgresql() -> None:
    for table in Base.metadata.sorted_tables:
        assert "CREATE TABLE" in str(CreateTable(table).compile(dialect=postgresql.dialect()))


def test_a_new_or_present_schema_needs_no_backup(home: Path, registry: Registry) -> None:
    open_registry(home).close()
    assert revision(home) == "0002"
    assert not (home / "backups").exists()


def test_an_older_schema_is_upgraded_after_a_backup_and_loses_nothing(
    home: Path, database: Database, registry: Registry, tmp_path: Path
) -> None:
    backup = migrate(database, home / "backups", later_scripts(tmp_path))
    assert revision(home) == "0003"
    assert backup is not None
    with closing(sqlite3.connect(backup)) as raw:
        assert raw.execute("SELECT version_num FROM alembic_version").fetchone() == ("0002",)
        assert raw.execute("SELECT name FROM models").fetchall() == [("tiny-tq3",)]
    model = registry.get("tiny-tq3")
    assert len(model.files) == 3
    assert model.tags == ("kept",)


@pytest.mark.parametrize(
    "failure",
    [
        "raise RuntimeError('broken')",
        "op.execute('PRAGMA defer_foreign_keys=ON'); op.execute('DELETE FROM models')",
    ],
    ids=["raises", "breaks references"],
)
def test_a_migration_that_fails_leaves_the_old_schema_whole(
    home: Path, database: Database, registry: Registry, tmp_path: Path, failure: str
) -> None:
    with pytest.raises((RuntimeError, RegistryError), match=r"broken|broke 4 references"):
        migrate(database, home / "backups", later_scripts(tmp_path, failure))
    assert revision(home) == "0002"
    assert registry.verify("tiny-tq3").ok


def test_a_newer_schema_is_refused(home: Path, registry: Registry) -> None:
    with closing(sqlite3.connect(home / "registry.sqlite", isolation_level=None)) as raw:
        raw.execute("UPDATE alembic_version SET version_num = '0999'")
    with pytest.raises(RegistryError, match=r"newer version \(schema 0999; .* up to 0002\).*Upgrade"):
        open_registry(home)


def test_a_server_database_is_not_backed_up_here(
    home: Path, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "file", None)
    assert migrate(database, home / "backups", later_scripts(tmp_path)) is None
    assert revision(home) == "0003"


def test_speeds_told_by_too_few_tokens_are_forgotten_and_others_kept(
    home: Path, database: Database, registry: Registry
) -> None:
    measured = SpeedRecord(
        device="", backend="", kernel_path="", prompt_tokens=5, generation_tokens=64,
        prompt_tokens_per_s=9.0, generation_tokens_per_s=8.0,
    )  # fmt: skip
    few = [replace(measured, prompt_tokens=1), replace(measured, generation_tokens=2)]
    registry.add_speed("tiny-tq3", measured, *few)
    with closing(sqlite3.connect(home / "registry.sqlite", isolation_level=None)) as raw:
        raw.execute("UPDATE alembic_version SET version_num = '0001'")
    migrate(database, home / "backups")
    assert [(speed.prompt_tokens_per_s, speed.generation_tokens_per_s) for speed in registry.speeds("tiny-tq3")] == [
        (9, 8), (None, 8), (9, None),
    ]  # fmt: skip


@pytest.mark.parametrize("name", sorted(path.name for path in (SCRIPTS / "versions").glob("*.py")))
def test_migrations_only_go_forward(name: str) -> None:
    namespace: dict[str, Callable[[], None]] = {}
    exec((SCRIPTS / "versions" / name).read_text(), namespace)
    with pytest.raises(NotImplementedError, match="Restore the backup"):
        namespace["downgrade"]()
