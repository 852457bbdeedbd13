"""Which files of an unfinished folder are finished, so that work which was killed goes on from there."""

import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple, Self

from quant_engine.file_hash import file_sha256
from quant_engine.output_folder import sync

JOURNAL = ".finished"


class OutputFile(NamedTuple):
    """A file of a converted model; its name is the path in the model's folder."""

    name: str
    size_bytes: int
    sha256: str

    @classmethod
    def of(cls, folder: Path, name: str) -> Self:
        """A file as it is on the disk, read for its hash."""
        return cls(name, (folder / name).stat().st_size, file_sha256(folder / name))


class Journal:
    """The finished files of a folder, by name: those that a run before this one noted, and those of this one.

    Opening it reads the files noted before and keeps those of the size and hash noted; all else that is in the folder
    is deleted, but for the folder `spare`.
    """

    def __init__(self, folder: Path, spare: str | None = None) -> None:
        self._folder, self._path = folder, folder / JOURNAL
        self.finished: dict[str, OutputFile] = {}
        noted = _read(self._path)
        for path in sorted(folder.iterdir()):
            if path.is_dir() and path.name == spare:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif _unchanged(path, noted.get(path.name)):
                self.finished[path.name] = noted[path.name]
            elif path != self._path:
                path.unlink()

    def add(self, name: str, sha256: str) -> None:
        """Note a file that is flushed to the disk, and its hash."""
        self.finished[name] = OutputFile(name, (self._folder / name).stat().st_size, sha256)
        with open(self._path, "a", encoding="utf-8") as file:
            # A line that a power cut left unfinished ends where this one begins.
            file.write("\n" + json.dumps(self.finished[name]._asdict()) + "\n")
            file.flush()
            os.fsync(file.fileno())
        sync(self._folder)

    def close(self) -> list[OutputFile]:
        """Remove the journal and tell of every file in the folder, sorted; those that it noted are not read again."""
        paths = sorted(path for path in self._folder.rglob("*") if path.is_file() and path != self._path)
        names = [path.relative_to(self._folder).as_posix() for path in paths]
        files = [self.finished.get(name) or OutputFile.of(self._folder, name) for name in names]
        self._path.unlink(missing_ok=True)
        return files


def _read(path: Path) -> dict[str, OutputFile]:
    """The files noted, the last note of each; lines that are not whole say nothing."""
    noted: dict[str, OutputFile] = {}
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            file = OutputFile(**json.loads(line))
        except (ValueError, TypeError):
            continue
        noted[file.name] = file
    return noted


def _unchanged(path: Path, noted: OutputFile | None) -> bool:
    if noted is None or path.is_symlink() or path.stat().st_size != noted.size_bytes:
        return False
    return file_sha256(path) == noted.sha256
