"""Slots where models are made. A slot is locked by the process that uses it, so that what a killed
process has left is known for what it is: the same model goes on in it, any other one deletes it."""

import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from registry.layout import Layout
from registry.lock import locked, try_lock

LOCK, ELSEWHERE = ".lock", ".elsewhere"
OURS = re.compile(r"[0-9a-f]{32}")


@contextmanager
def slot(
    layout: Layout,
    final: Path,
    in_use: Callable[[], tuple[Path, ...]],
    resumable: tuple[type[BaseException], ...] = (),
) -> Generator[Path, None, None]:
    """A path for the new folder, not existing yet, on the same file system as `final`. What a killed process
    had beside it for the same `final` is there again, other slots of dead processes are deleted, but for
    those that hold one of the folders `in_use`. What is still in the slot at the end is deleted, but for work that
    an exception of the kinds `resumable` has left beside the path: it stays as after a kill."""
    with locked(layout.lock):
        kept = in_use()
        home, held = _take(layout, final, kept)
        sweep(layout, kept, unfinished=True)
    workshop, goes_on = _place(layout, final, home.name), False
    try:
        if not workshop.exists():
            (home / ELSEWHERE).write_text(str(workshop))
            workshop.mkdir(parents=True)
        discard(workshop / final.name)
        yield workshop / final.name
    except resumable:
        discard(workshop / final.name)
        goes_on = _has_work(workshop)
        raise
    finally:
        try:
            if not goes_on:
                with locked(layout.lock):  # or another process could take the slot while it disappears
                    discard(workshop)
                    discard(home)
        finally:
            os.close(held)


def _take(layout: Layout, final: Path, kept: tuple[Path, ...]) -> tuple[Path, int]:
    """The slot that belongs to `final`, or another where that one is in use, and a lock on it."""
    both = os.fsencode(f"{layout.home}\n{final}")  # two registries may make a model for the same outside place
    names = [hashlib.sha256(both).hexdigest()[:32]]
    while True:
        name = names.pop() if names else uuid.uuid4().hex
        workshop, home = _place(layout, final, name), layout.staging / name
        if any(path.is_relative_to(workshop) for path in kept):
            continue
        home.mkdir(exist_ok=True)
        if (held := try_lock(home / LOCK)) is not None:
            return home, held


def _place(layout: Layout, final: Path, name: str) -> Path:
    """Where a slot of that name has its files: on the same file system as `final`."""
    return sibling(final, name) if layout.is_external(final) else layout.staging / name


def trash(layout: Layout, final: Path) -> Path:
    """A new path on the same file system as `final`, for a folder about to be deleted."""
    return _place(layout, final, uuid.uuid4().hex)


def sibling(final: Path, name: str) -> Path:
    return final.parent / f".tq-staging-{name}"


def sweep(layout: Layout, kept: tuple[Path, ...], *, unfinished: bool) -> None:
    """Delete the slots of dead processes, but for those that hold one of the folders `kept`, and, unless
    `unfinished`, those in which work can go on. The caller holds the registry's lock, so no slot is just being
    made."""
    for home in layout.staging.iterdir():
        if OURS.fullmatch(home.name):
            with suppress(OSError):  # the next sweep tries again
                _sweep_one(home, kept, unfinished)


def _sweep_one(home: Path, kept: tuple[Path, ...], unfinished: bool) -> None:
    workshop = _workshop(home)
    if any(path.is_relative_to(workshop) for path in kept) or (_has_work(workshop) and not unfinished):
        return
    if (held := try_lock(home / LOCK)) is not None:
        discard(workshop)
        discard(home)
        os.close(held)


def _has_work(workshop: Path) -> bool:
    return workshop.is_dir() and any(path.name not in (LOCK, ELSEWHERE) for path in workshop.iterdir())


def discard(folder: Path) -> None:
    """Delete a folder, or a link to one, that may be gone. What cannot be deleted now is left to the next sweep."""
    if folder.is_symlink():
        folder.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _workshop(home: Path) -> Path:
    note = home / ELSEWHERE
    elsewhere = Path(note.read_text()) if note.is_file() else home
    return elsewhere if elsewhere.name == sibling(home, home.name).name else home
