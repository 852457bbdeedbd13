"""Connections and transactions. Everything that only SQLite knows is in this file."""

import sqlite3
from collections.abc import Generator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Literal, cast

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError
from sqlalchemy.orm import Session

from registry.errors import RegistryError
from registry.network import network_file_system

Mode = Literal["read", "write", "durable", "migrate"]

BUSY_TIMEOUT_MS = 30_000
# busy_timeout comes first: the others may already meet a lock.
ON_CONNECT = (
    f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}",
    "PRAGMA journal_mode=WAL",
    "PRAGMA synchronous=NORMAL",
    "PRAGMA foreign_keys=ON",
    "PRAGMA trusted_schema=OFF",
)
# IMMEDIATE takes the write lock before the first read: what is read cannot change before it is written.
# "durable" survives a power cut, for rows that must not lag behind folders. Migrations rebuild tables,
# and dropping the old one would cascade to other tables if foreign keys were on.
ON_BEGIN: dict[Mode, tuple[str, ...]] = {
    "read": ("BEGIN",),
    "write": ("PRAGMA synchronous=NORMAL", "BEGIN IMMEDIATE"),
    "durable": ("PRAGMA synchronous=FULL", "BEGIN IMMEDIATE"),
    "migrate": ("PRAGMA foreign_keys=OFF", "PRAGMA synchronous=FULL", "BEGIN IMMEDIATE"),
}


class Database:
    """The registry's database: SQLite in a file, or any other that SQLAlchemy reaches by URL.

    Raises RegistryError for a URL that cannot be used, and for SQLite on a network file system, where
    its write-ahead log is unsafe."""

    def __init__(self, url: str | Path) -> None:
        self.url = URL.create("sqlite", database=str(url)) if isinstance(url, Path) else _parse(url)
        self.file = _sqlite_file(self.url)
        self.label = str(self.file) if self.file else self.url.render_as_string(hide_password=True)
        if self.file and (kind := network_file_system(self.file.parent)):
            raise RegistryError(
                f"The registry's database {self.file} would lie on a network file system ({kind}), where "
                "SQLite loses data. Choose a home on a local disk, or give the database's URL separately: "
                "sqlite:////local/registry.sqlite or postgresql+psycopg://..."
            )
        self._engine = _engine(self.url, self.label, is_sqlite=self.file is not None)

    @contextmanager
    def connection(self, mode: Mode) -> Generator[Connection, None, None]:
        """A transaction: committed at the end, rolled back by any exception. "read" never commits."""
        try:
            with self._engine.connect().execution_options(registry_mode=mode) as connection:
                if mode == "migrate":
                    connection.detach()
                connection.begin()
                yield connection
                if mode != "read":
                    connection.commit()
        except DBAPIError as error:
            raise RegistryError(_explain(self.label, error)) from error

    @contextmanager
    def reading(self) -> Generator[Session, None, None]:
        with self.connection("read") as connection, Session(connection, autoflush=False) as session:
            yield session

    @contextmanager
    def writing(self, *, durable: bool = False) -> Generator[Session, None, None]:
        with self.connection("durable" if durable else "write") as connection, Session(connection) as session:
            yield session
            session.flush()

    def check_integrity(self, connection: Connection) -> None:
        """After a migration ran without foreign keys: every reference still finds its row."""
        if self.file and (broken := connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall()):
            raise RegistryError(f"The migration of {self.label} broke {len(broken)} references; undone.")

    def backup(self, target: Path) -> None:
        """Copy the database to a new file while others go on using it, and check the copy."""
        if self.file is None:
            raise RegistryError(f"{self.label} is not SQLite: back it up with its own tools (pg_dump).")
        if target.exists():
            raise RegistryError(f"The backup {target} exists already. Choose another file name.")
        partial = target.with_name(f".{target.name}.partial")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _copy(self.file, partial)
            partial.rename(target)
        except (OSError, sqlite3.Error) as error:
            raise RegistryError(f"The backup to {target} failed: {error}.") from error
        finally:
            with suppress(OSError):
                partial.unlink()

    def close(self) -> None:
        self._engine.dispose()


def _parse(url: str) -> URL:
    try:
        return make_url(url)
    except ArgumentError as error:
        raise RegistryError(
            "The database URL cannot be read. Write sqlite:////folder/registry.sqlite or "
            "postgresql+psycopg://user:password@host/database."
        ) from error


def _sqlite_file(url: URL) -> Path | None:
    if url.get_backend_name() != "sqlite":
        return None
    if not url.database or url.database == ":memory:":
        raise RegistryError("A registry in memory would forget every model. Give SQLite a file.")
    return Path(url.database).resolve()


def _engine(url: URL, label: str, *, is_sqlite: bool) -> Engine:
    try:
        engine = create_engine(url)
    except NoSuchModuleError as error:
        raise RegistryError(f"SQLAlchemy knows no database of the kind in {label}.") from error
    except ImportError as error:
        raise RegistryError(f"{label} needs a driver that is not installed: {error.name}.") from error
    if is_sqlite:
        event.listen(engine, "connect", _prepare)
        event.listen(engine, "begin", _begin)
    return engine


def _prepare(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # sqlite3 would begin transactions by itself, and late
    for statement in ON_CONNECT:
        connection.execute(statement).close()


def _begin(connection: Connection) -> None:
    mode = cast(Mode, connection.get_execution_options().get("registry_mode", "read"))
    for statement in ON_BEGIN[mode]:
        connection.exec_driver_sql(statement)


def _copy(source: Path, target: Path) -> None:
    with closing(sqlite3.connect(source)) as old, closing(sqlite3.connect(target)) as new:
        old.backup(new)
        new.execute("PRAGMA journal_mode=DELETE").close()  # one file, no companions to lose
        (answer,) = new.execute("PRAGMA integrity_check").fetchone()
        if answer != "ok":
            raise sqlite3.DatabaseError(f"the copy is damaged: {answer}")


def _explain(label: str, error: DBAPIError) -> str:
    reason = str(error.orig)
    if isinstance(error, IntegrityError):
        return f"The registry {label} refused the change, another may have come first: {reason}. Try again."
    advice = {
        "locked": "Another process has kept it locked for too long; end it or try again.",
        "full": "Free some disk space and try again.",
        "readonly": "Make the file and its folder writable.",
        "unable to open": "Check that the folder exists and may be written.",
        "not a database": "The file is something else: choose another home, or restore a backup.",
        "malformed": "The file is damaged: restore a backup.",
    }
    hint = next((text for word, text in advice.items() if word in reason), "")
    return f"The registry {label} cannot be used: {reason}. {hint}".strip()
