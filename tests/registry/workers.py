"""What several processes do to one registry at once: run as a program by test_processes.py."""

import os
import signal
import sys
from pathlib import Path

from sqlalchemy import select

from registry import ModelRecord, RegistryError, open_registry
from registry.session import Database
from registry.tables import ModelRow


def record(name: str) -> ModelRecord:
    return ModelRecord(
        name=name, source="org/tiny", source_sha256="a" * 64, architecture="llama", parameters=1,
        bits_per_weight=3.25, recipe={}, versions={},
    )  # fmt: skip


def count(home: Path, times: int, _who: str) -> None:
    """Read a number, write it back one greater."""
    database = Database(home / "registry.sqlite")
    for _ in range(times):
        with database.writing() as session:
            row = session.scalars(select(ModelRow)).one()
            row.seed += 1


def publish(home: Path, times: int, who: str) -> None:
    """Publish models of its own, and try for names that the others want too; print the names won."""
    with open_registry(home) as registry:
        for number in range(times):
            for name in (f"{who}-{number}", f"shared-{number}"):
                with registry.staging(name) as staging:
                    staging.mkdir()
                    (staging / "model.safetensors").write_text(who)
                    try:
                        registry.publish(record(name), staging)
                    except RegistryError as error:
                        if "is taken" not in str(error):
                            raise
                    else:
                        print(name, flush=True)


def convert_forever(home: Path, _times: int, who: str) -> None:
    """Die in the middle of making a model, in a folder of its own where `who` is a path."""
    final = Path(who) if "/" in who else None
    with open_registry(home) as registry, registry.staging(Path(who).name, final) as staging:
        staging.mkdir()
        (staging.parent / "beside").mkdir()
        (staging / "half.safetensors").write_text("half")
        print(staging, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


def die_publishing(home: Path, _times: int, who: str) -> None:
    """Die with a finished model about to be moved to its place."""
    with open_registry(home) as registry, registry.staging(who) as staging:
        staging.mkdir()
        (staging / "model.safetensors").write_text(who)
        setattr(Path, "rename", lambda *_: os.kill(os.getpid(), signal.SIGKILL))  # noqa: B010
        registry.publish(record(who), staging)


if __name__ == "__main__":
    task, folder, repetitions, name_of_worker = sys.argv[1:]
    {"count": count, "publish": publish, "convert": convert_forever, "die-publishing": die_publishing}[task](
        Path(folder), int(repetitions), name_of_worker
    )
