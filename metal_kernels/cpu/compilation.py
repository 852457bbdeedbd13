"""Word of numba's compiling, so that a first use is not taken for a hang."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from numba.core import event

NOTICE = "compiling CPU kernels for this processor (once; later runs load them from disk)"


class _Once(event.Listener):
    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell: Callable[[str], None] | None = tell

    def on_start(self, event: Any) -> None:
        if self._tell is not None:
            self._tell(NOTICE)
            self._tell = None

    def on_end(self, event: Any) -> None:
        pass


@contextmanager
def announce_compilation(tell: Callable[[str], None]) -> Generator[None]:
    """Within the block, call `tell` with a line of text at the first kernel that must be compiled."""
    with event.install_listener("numba:compile", _Once(tell)):
        yield
