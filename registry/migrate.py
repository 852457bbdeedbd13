"""Bringing a database to the schema of this version, by Alembic."""

from datetime import UTC, datetime
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect

from registry.errors import RegistryError
from registry.session import Database

SCRIPTS = Path(__file__).with_name("migrations")


def migrate(database: Database, backups: Path, scripts: Path = SCRIPTS) -> Path | None:
    """Upgrade to the newest schema, all or nothing, after a backup of what was there.

    Returns the backup's path where one was made. Raises RegistryError for a database that a newer
    version wrote, and for one that is no registry. Call it under the registry's lock."""
    config = configuration(scripts)
    known = ScriptDirectory.from_config(config)
    newest = known.get_current_head()
    with database.connection("read") as connection:
        current = _revision(connection, database.label)
    if current == newest:
        return None
    if current is not None and current not in {script.revision for script in known.walk_revisions()}:
        raise RegistryError(
            f"The registry {database.label} was written by a newer version (schema {current}; this version "
            f"knows up to {newest}). Upgrade tq-mcp, or choose another home."
        )
    backup = _back_up(database, backups, current) if current is not None else None
    with database.connection("migrate") as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        database.check_integrity(connection)
    return backup


def configuration(scripts: Path = SCRIPTS) -> Config:
    config = Config()
    config.set_main_option("script_location", str(scripts).replace("%", "%%"))
    return config


def _revision(connection: Connection, label: str) -> str | None:
    revision = MigrationContext.configure(connection).get_current_revision()
    if revision is None and (tables := inspect(connection).get_table_names()):
        raise RegistryError(
            f"{label} is not a registry: it holds other tables ({', '.join(tables[:3])}). "
            "Choose another home, or move that file away."
        )
    return revision


def _back_up(database: Database, backups: Path, current: str) -> Path | None:
    if database.file is None:
        return None  # a server's own backups cover it
    target = backups / f"before-migration-from-{current}-{datetime.now(UTC):%Y%m%dT%H%M%S%f}.sqlite"
    database.backup(target)
    return target
