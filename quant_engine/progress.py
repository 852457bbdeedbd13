"""How long work reports where it is, and how it is stopped."""

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""Called with (done, total, message). An exception raised inside it stops the work, which cleans up after itself."""


def silent(done: int, total: int, message: str) -> None:
    """Report to nobody."""


class Steps:
    """A count of steps done out of all, passed on to a `Progress`."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def add(self, message: str, count: int = 1) -> None:
        """So many more steps are done."""
        self.reach(self._done + count, message)

    def reach(self, done: int, message: str) -> None:
        """So many steps are done, those that turned out not to be needed included."""
        self._done = done
        self._progress(done, self._total, message)
