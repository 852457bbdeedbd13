"""Connections, transactions, and what is said when the database cannot be used."""

import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import URL, select
from sqlalchemy.orm import Session

from registry import Model, RegistryError, open_registry, session
from registry.session import Database
from registry.tables import ModelRow, TagRow


@pytest.fixture
def database(home: Path, publish: Callable[..., Model]) -> Iterator[Database]:
    publish()
    opened = Database(home / "registry.sqlite")
    yield opened
    opened.close()


def pragma(current: Session, name: str) -> object:
    return current.connection().exec_driver_sql(f"PRAGMA {name}").scalar()


def test_connections_wait_log_ahead_and_keep_references(database: Database) -> None:
    with database.reading() as current:
        assert pragma(current, "busy_timeout") == 30_000
        assert pragma(current, "journal_mode") == "wal"
        assert pragma(current, "foreign_keys") == 1
        assert pragma(current, "trusted_schema") == 0
    assert session.ON_CONNECT[0].startswith("PRAGMA busy_timeout")


def test_rows_that_go_with_folders_are_synced_and_others_are_not(database: Database) -> None:
    with database.writing() as current:
        assert pragma(current, "synchronous") == 1
    with database.writing(durable=True) as current:
        assert pragma(current, "synchronous") == 2
    with database.writing() as current:
        assert pragma(current, "synchronous") == 1


def test_a_writer_holds_the_lock_from_the_start_and_readers_go_on(database: Database) -> None:
    started, finished = threading.Event(), threading.Event()

    def write() -> None:
        started.set()
        with database.writing() as current:
            current.scalars(select(ModelRow)).one().seed = 2
        finished.set()

    with database.writing() as current:
        current.scalars(select(ModelRow)).one().seed = 1
        other = threading.Thread(target=write)
        other.start()
        started.wait()
        assert not finished.wait(0.2), "two writers at once"
        with database.reading() as reader:
            assert reader.scalars(select(ModelRow)).one().seed == 0
    other.join()
    with database.reading() as reader:
        assert reader.scalars(select(ModelRow)).one().seed == 2


def test_an_exception_undoes_the_transaction_and_a_reader_never_writes(database: Database) -> None:
    with pytest.raises(ZeroDivisionError), database.writing() as current:
        current.scalars(select(ModelRow)).one().seed = 1
        current.flush()
        raise ZeroDivisionError
    with database.reading() as current:
        current.scalars(select(ModelRow)).one().seed = 1
        current.flush()
    with database.reading() as current:
        assert current.scalars(select(ModelRow)).one().seed == 0


def test_a_reference_to_nothing_is_refused(database: Database) -> None:
    with (
        pytest.raises(RegistryError, match=r"refused the change.*FOREIGN KEY"),
        database.writing() as current,
    ):
        current.add(TagRow(model_id=99, tag="x"))


def test_a_lock_held_too_long_is_named(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "ON_CONNECT", ("PRAGMA busy_timeout=50",))
    hurried = Database(database.file or Path())
    with (
        database.writing(),
        pytest.raises(RegistryError, match=r"locked.*Another process"),
        hurried.writing(),
    ):
        pass
    hurried.close()


def test_files_that_are_no_registry_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "registry.sqlite").write_text("not a database at all, but long enough to be read" * 50)
    with pytest.raises(RegistryError, match=r"not a database.*restore a backup"):
        open_registry(tmp_path / "a")
    (tmp_path / "b").mkdir()
    with closing(sqlite3.connect(tmp_path / "b" / "registry.sqlite")) as other:
        other.execute("CREATE TABLE recipes (id)")
    with pytest.raises(RegistryError, match=r"not a registry.*recipes"):
        open_registry(tmp_path / "b")


def test_a_home_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RegistryError, match=r"home folder .* cannot be used"):
        open_registry(tmp_path / "file" / "home")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "cannot be read"),
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("unheard://host/db", "knows no database"),
    ],
)
def test_urls_that_cannot_be_used_are_refused(home: Path, url: str, message: str) -> None:
    with pytest.raises(RegistryError, match=message):
        open_registry(home, url)


def test_a_missing_driver_is_named_and_the_password_is_not(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(RegistryError, match="driver that is not installed") as caught:
        open_registry(home, "postgresql+psycopg://me:secret@host/db")
    assert "secret" not in str(caught.value)


def test_the_database_may_lie_elsewhere_than_the_models(home: Path, tmp_path: Path) -> None:
    place = tmp_path / "with space%20"
    place.mkdir()
    url = URL.create("sqlite", database=str(place / "r.sqlite")).render_as_string()
    open_registry(home, url).close()
    assert (place / "r.sqlite").exists()
    assert not (home / "registry.sqlite").exists()


def test_a_network_file_system_is_refused_with_the_way_out(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "network_file_system", lambda _: "nfs4")
    with pytest.raises(RegistryError, match=r"network file system \(nfs4\).*local disk.*postgresql"):
        open_registry(home)


def test_only_sqlite_is_backed_up_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = Database(tmp_path / "r.sqlite")
    monkeypatch.setattr(database, "file", None)
    with pytest.raises(RegistryError, match="its own tools"):
        database.backup(tmp_path / "copy.sqlite")


def test_a_damaged_copy_is_no_backup(database: Database, tmp_path: Path) -> None:
    with closing(sqlite3.connect(database.file or "")) as raw:
        (page,) = raw.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'models'").fetchone()
        (size,) = raw.execute("PRAGMA page_size").fetchone()
        raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").close()
    with (database.file or Path()).open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\x0d" + b"\xff" * 200)
    with pytest.raises(RegistryError, match="failed"):
        database.backup(tmp_path / "copy.sqlite")
    assert list(tmp_path.glob("*copy*")) == []
