"""A folder that appears whole or not at all, and survives a process that is killed."""

import fcntl
import os
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from quant_engine.errors import DISK_ERRORS, DownloadError, OutputError
from quant_engine.source import ALLOWED_FILES, WEIGHTS

_PARTIAL, _REPLACED = "partial", "replaced"
_MARGIN_BYTES = 16_000_000


@contextmanager
def atomic_folder(
    output: Path, *, size_bytes: int, overwrite: bool = False, key: str | None = None, keep: bool = False
) -> Generator[Path]:
    """A folder beside `output` to write in; it takes output's name when the block ends without an exception.

    size_bytes: what will be in it, checked against the free space first. key: letters and digits that stand for
    what is made; where a killed process left an unfinished folder of the same output and key, the block gets that
    one, as it was left. Otherwise the folder is new and empty, and what was left is removed, as it is at once after
    an exception. keep: leave it, as after a kill, where a download stopped or the disk failed. A folder that is being
    overwritten stays until the new one is whole. Raises OutputError where output exists (unless overwrite), cannot be
    written or does not fit.
    """
    with _disk_errors(output):
        check_target(output, overwrite)
        output.parent.mkdir(parents=True, exist_ok=True)
        _put_back(output)
        check_target(output, overwrite)
        folder, lock = _take_over(output, key) or _make(output, key)
        try:
            _check_space(output, size_bytes - _held_bytes(folder))
            yield folder
            sync_files(folder)
            _take_place(folder, output, overwrite)
        except (DownloadError, OutputError, OSError) as error:
            if not keep or not any(folder.iterdir()):
                shutil.rmtree(folder, ignore_errors=True)
            elif isinstance(error, OSError) and error.errno in DISK_ERRORS:
                advice = "what was finished is kept: free space, then run it again, it continues"
                raise _cannot_write(output, error, advice) from error
            raise
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            os.close(lock)


def sync_files(folder: Path) -> None:
    """Flush every file under a folder, and the folder, to the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of files, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _disk_errors(output: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        advice = "nothing was left there: free space or choose another place, then run it again"
        raise _cannot_write(output, error, advice) from error


def _cannot_write(output: Path, error: OSError, advice: str) -> OutputError:
    return OutputError(f"cannot write {output}: {DISK_ERRORS[error.errno or 0]}; {advice}")


def check_target(output: Path, overwrite: bool) -> None:
    """Raise OutputError where `output` cannot be made: it exists (unless overwrite), or is something else."""
    with _disk_errors(output):
        if output.is_symlink() or (output.exists() and not output.is_dir()):
            raise OutputError(f"{output} is not a folder; choose another output")
        if not output.exists() or not any(output.iterdir()):
            return
        if not overwrite:
            raise OutputError(f"{output} exists already; choose another output, or ask for it to be overwritten")
        if lacking := [name for name in ("config.json", WEIGHTS) if not any(output.glob(name))]:
            raise OutputError(
                f"{output} is not a model (it has no {lacking[0]}), so it is not overwritten; choose another "
                "output, or remove it yourself"
            )
        if foreign := _foreign(output):
            raise OutputError(
                f"{output} also holds what belongs to no model ({', '.join(foreign[:5])}), so it is not overwritten; "
                "choose another output, or move that away"
            )


def _foreign(folder: Path) -> list[str]:
    """The files in a folder that no model has, by their path in it."""
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir())
    return [name for name in names if not any(fnmatchcase(name, pattern) for pattern in ALLOWED_FILES)]


def _check_space(output: Path, size_bytes: int) -> None:
    free = shutil.disk_usage(output.parent).free
    if free < size_bytes + _MARGIN_BYTES:
        raise OutputError(
            f"{output} would take {size_bytes / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free there; free "
            "some space, choose another disk, or fewer bits"
        )


def _prefix(output: Path, kind: str) -> str:
    return f".{output.name}.{kind}-"


def _siblings(output: Path, kind: str) -> list[Path]:
    return [path for path in output.parent.iterdir() if path.name.startswith(_prefix(output, kind))]


def _put_back(output: Path) -> None:
    """Put back a folder that a killed process was about to replace."""
    for folder in _siblings(output, _REPLACED):
        if not output.exists():
            folder.rename(output)
        else:
            shutil.rmtree(folder)


def _take_over(output: Path, key: str | None) -> tuple[Path, int] | None:
    """What a killed process left of the same key, and a lock on it; all else that killed processes left is removed."""
    found = None
    for folder in _siblings(output, _PARTIAL):
        lock = _lock(folder)
        if lock is None:
            continue
        if key and found is None and folder.name.startswith(f"{_prefix(output, _PARTIAL)}{key}-"):
            found = folder, lock
            continue
        shutil.rmtree(folder)
        os.close(lock)
    return found


def _make(output: Path, key: str | None) -> tuple[Path, int]:
    """A new folder and a lock on it. Between the two, another process may take it for one that was left."""
    while True:
        folder = output.parent / f"{_prefix(output, _PARTIAL)}{key or 'new'}-{secrets.token_hex(4)}"
        folder.mkdir()
        lock = _lock(folder)
        if lock is not None:
            return folder, lock


def _held_bytes(folder: Path) -> int:
    """What the files in a folder take on the disk now; a file with holes takes less than its size."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*"))


def _lock(folder: Path) -> int | None:
    """A lock on a folder, held as long as the descriptor is open; None where it is another's, or was finished or
    removed by another just now."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    if not folder.exists():
        os.close(descriptor)
        return None
    return descriptor


def _take_place(folder: Path, output: Path, overwrite: bool) -> None:
    """Give the finished folder its name; a folder that is there moves aside and is removed last."""
    check_target(output, overwrite)
    aside = None
    if output.exists():
        aside = output.parent / folder.name.replace(_prefix(output, _PARTIAL), _prefix(output, _REPLACED))
        output.rename(aside)
    folder.rename(output)
    sync(output.parent)
    if aside is not None:
        shutil.rmtree(aside)
