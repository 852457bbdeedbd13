"""Locks between processes that the operating system frees when their holder dies."""

import fcntl
import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from registry.errors import RegistryError

POLL_S = 0.01


def try_lock(path: Path) -> int | None:
    """Lock a file, making it if need be; None if another holds it. Closing the descriptor frees it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


@contextmanager
def locked(path: Path, timeout_s: float = 60.0) -> Generator[None, None, None]:
    """Hold the lock on a file, waiting for others (threads too) up to `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while (descriptor := try_lock(path)) is None:
        if time.monotonic() > deadline:
            raise RegistryError(
                f"Another process has held {path} for {timeout_s:.0f} s. End it, or wait and try again."
            )
        time.sleep(POLL_S)
    try:
        yield
    finally:
        os.close(descriptor)
