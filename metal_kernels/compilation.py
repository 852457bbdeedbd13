"""Word of kernels' compiling, so that a first use is not taken for a hang."""

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any

from numba.core import event

ON_CUDA = "turboquant:compile"
NOTICES = {
    "numba:compile": "compiling CPU kernels for this processor (once; later runs load them from disk)",
    ON_CUDA: "compiling GPU kernels, a second or two for each (in every run: MLX does not keep them)",
}


class _Once(event.Listener):
    def __init__(self, tell: Callable[[str], None], notice: str) -> None:
        self._tell: Callable[[str], None] | None = tell
        self._notice = notice

    def on_start(self, event: Any) -> None:
        if self._tell is not None:
            self._tell(self._notice)
            self._tell = None

    def on_end(self, event: Any) -> None:
        pass


@contextmanager
def announce_compilation(tell: Callable[[str], None]) -> Generator[None]:
    """Within the block, call `tell` with a line of text at the first kernel of each kind that must be compiled."""
    with ExitStack() as listening:
        for kind, notice in NOTICES.items():
            listening.enter_context(event.install_listener(kind, _Once(tell, notice)))
        yield


def compiles_on_cuda() -> None:
    """To be called where MLX is about to compile a kernel for NVIDIA."""
    event.broadcast(event.Event(ON_CUDA, event.EventStatus.START))
