"""Slots where models are made. A slot is locked by the process that uses it, so that what a killed
process has left is known for what it is and deleted by the next one."""

import os
import re
import shutil
import uuid
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

from registry.layout import Layout
from registry.lock import locked, try_lock

LOCK, ELSEWHERE = ".lock", ".elsewhere"
OURS = re.compile(r"[0-9a-f]{32}")


@contextmanager
def slot(layout: Layout, final: Path) -> Generator[Path, None, None]:
    """A path for the new folder, not existing yet, on the same file system as `final`. What is still
    in the slot at the end is deleted."""
    name = uuid.uuid4().hex
    home = layout.staging / name
    workshop = sibling(final, name) if layout.is_external(final) else home
    with locked(layout.lock):
        home.mkdir()
        held = try_lock(home / LOCK)
    try:
        if workshop != home:
            (home / ELSEWHERE).write_text(str(workshop))
            workshop.mkdir(parents=True)
        yield workshop / final.name
    finally:
        discard(workshop)
        discard(home)
        if held is not None:
            os.close(held)


def trash(layout: Layout, final: Path) -> Path:
    """A new path on the same file system as `final`, for a folder about to be deleted."""
    name = uuid.uuid4().hex
    return sibling(final, name) if layout.is_external(final) else layout.staging / name


def sibling(final: Path, name: str) -> Path:
    return final.parent / f".tq-staging-{name}"


def sweep(layout: Layout, in_use: Iterable[Path]) -> None:
    """Delete the slots of dead processes, but for those that hold one of the folders `in_use`. The
    caller holds the registry's lock, so no slot is just being made."""
    kept = tuple(in_use)
    for home in layout.staging.iterdir():
        if OURS.fullmatch(home.name):
            with suppress(OSError):  # its owner may be deleting it at this moment
                _sweep_one(home, kept)


def _sweep_one(home: Path, kept: tuple[Path, ...]) -> None:
    workshop = _workshop(home)
    if any(path.is_relative_to(workshop) for path in kept):
        return
    if (held := try_lock(home / LOCK)) is not None:
        discard(workshop)
        discard(home)
        os.close(held)


def discard(folder: Path) -> None:
    """Delete a folder that may be gone. What cannot be deleted now is left to the next sweep."""
    shutil.rmtree(folder, ignore_errors=True)


def _workshop(home: Path) -> Path:
    note = home / ELSEWHERE
    elsewhere = Path(note.read_text()) if note.is_file() else home
    return elsewhere if elsewhere.name == sibling(home, home.name).name else home
