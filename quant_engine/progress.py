"""How long work reports where it is, and how it is stopped."""

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""Called with (done, total, message). An exception raised inside it stops the work, which cleans up after itself."""


def silent(done: int, total: int, message: str) -> None:
    """Report to nobody."""
