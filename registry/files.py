"""A model's folder: listing, hashing and comparing its files, and getting them onto the disk."""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from registry.errors import RegistryError
from registry.records import FileRecord, Problem

Progress = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all, and the file at hand; an exception from it ends the work."""

# Finder leaves these in any folder that a person opens.
IGNORED = frozenset({".DS_Store"})
CHUNK_BYTES = 4 << 20


def silent(done: int, total: int, message: str) -> None:
    """Progress that nobody watches."""


def list_files(folder: Path) -> tuple[str, ...]:
    """Paths of everything in a folder but its subfolders, relative and sorted; links are not followed."""
    found: list[str] = []
    for parent, folders, names in os.walk(folder):
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        found += [(Path(parent) / name).relative_to(folder).as_posix() for name in (*names, *links)]
    return tuple(sorted(name for name in found if name.rpartition("/")[2] not in IGNORED))


def describe(folder: Path, progress: Progress = silent) -> tuple[FileRecord, ...]:
    """Size and SHA-256 of every file. Raises RegistryError for an empty folder, links and devices."""
    names = list_files(folder)
    if not names:
        raise RegistryError(f"There are no files in {folder}: a model needs at least one.")
    for name in names:
        if not _is_plain(folder / name):
            raise RegistryError(f"{folder / name} is not a plain file. Put a copy of the file in its place.")
    sizes = {name: (folder / name).stat().st_size for name in names}
    hashes = _hash(folder, names, sum(sizes.values()), progress)
    return tuple(FileRecord(path=name, size_bytes=sizes[name], sha256=hashes[name]) for name in names)


def compare_sizes(folder: Path, files: Iterable[FileRecord]) -> tuple[Problem, ...]:
    """What differs from `files` by name and size alone, without reading contents."""
    expected = {file.path: file for file in files}
    present = list_files(folder) if folder.is_dir() else ()
    foreign = [name for name in present if name not in expected]
    problems = [Problem(kind="foreign", path=name, detail="not one of the model's files") for name in foreign]
    for name, file in expected.items():
        path = folder / name
        if not os.path.lexists(path):
            problems.append(Problem(kind="missing", path=name, detail=f"{file.size_bytes} bytes expected"))
        elif not _is_plain(path):
            problems.append(Problem(kind="changed", path=name, detail="no longer a plain file"))
        elif (size := path.stat().st_size) != file.size_bytes:
            detail = f"{size} bytes, {file.size_bytes} expected"
            problems.append(Problem(kind="changed", path=name, detail=detail))
    return tuple(problems)


def compare(folder: Path, files: Sequence[FileRecord], progress: Progress = silent) -> tuple[Problem, ...]:
    """What differs from `files` by name, size or content."""
    problems = compare_sizes(folder, files)
    suspect = {problem.path for problem in problems}
    readable = [file for file in files if file.path not in suspect]
    hashes = _hash(folder, [f.path for f in readable], sum(f.size_bytes for f in readable), progress)
    changed = [
        Problem(kind="changed", path=file.path, detail="same size, other content (SHA-256 differs)")
        for file in readable
        if hashes[file.path] != file.sha256
    ]
    return tuple(sorted([*problems, *changed], key=lambda problem: problem.path))


def sync(folder: Path) -> None:
    """Get every file and folder below `folder`, and itself, onto the disk."""
    for parent, _folders, names in os.walk(folder):
        for name in names:
            sync_entry(Path(parent) / name)
        sync_entry(Path(parent))


def sync_entry(path: Path) -> None:
    """Get one file's content, or one folder's list of names, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _hash(folder: Path, names: Sequence[str], total: int, progress: Progress) -> dict[str, str]:
    done, hashes = 0, dict[str, str]()
    for name in names:
        digest = hashlib.sha256()
        with (folder / name).open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                done += len(chunk)
                progress(done, total, name)
        hashes[name] = digest.hexdigest()
    return hashes
