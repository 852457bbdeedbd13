"""The SHA-256 of a file, read at once or behind what writes it."""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import CancelledError, Executor
from io import FileIO
from mmap import ACCESS_READ, mmap
from pathlib import Path
from threading import Event

HASHED_BYTES = 2**23
"""Of a file that are hashed in one go, and in memory meanwhile."""

FLUSHED_BYTES = 2**26
"""Of a file that is being written, between one flush to the disk and the next."""


def file_sha256(path: Path, stopped: Event | None = None) -> str:
    """The SHA-256 of a file, in hexadecimal. Raises CancelledError where `stopped` is set meanwhile."""
    total = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        _read(total.update, file, 0, file.seek(0, os.SEEK_END), stopped)
    return total.hexdigest()


class RunningHash:
    """The SHA-256 of a file that is written from its beginning on: a thread of `pool` follows, and flushes it to disk.

    So when the last byte is written, little is left to read and to flush.
    """

    def __init__(self, path: Path, pool: Executor) -> None:
        self._path, self._pool = path, pool
        self._total = hashlib.sha256()
        self._hashed = self._whole = 0
        self._following = pool.submit(bool)

    def whole(self, position: int) -> None:
        """All bytes before `position` are written. Raises the OSError of an earlier part."""
        self._whole = position
        if position >= self._hashed + FLUSHED_BYTES and self._following.done():
            self._following.result()
            self._following = self._pool.submit(self._follow, position // FLUSHED_BYTES * FLUSHED_BYTES)

    def finish(self) -> str:
        """The hash of all that is whole, flushed. Raises OSError where the disk did not take or give it."""
        if not self._following.cancel():
            self._following.result()
        self._follow(self._whole)
        return self._total.hexdigest()

    def _follow(self, end: int) -> None:
        with open(self._path, "rb", buffering=0) as file:
            _read(self._total.update, file, self._hashed, end)
            os.fsync(file.fileno())
        self._hashed = end


def _read(take: Callable[[mmap], object], file: FileIO, start: int, end: int, stopped: Event | None = None) -> None:
    """Hand bytes [start, end) of a file, start a multiple of HASHED_BYTES, to `take`."""
    for first in range(start, end, HASHED_BYTES):
        if stopped is not None and stopped.is_set():
            raise CancelledError
        # Mapped, it is one call for a whole stretch: threads that compute keep a reading loop from its turns.
        with mmap(file.fileno(), min(HASHED_BYTES, end - first), access=ACCESS_READ, offset=first) as stretch:
            take(stretch)
