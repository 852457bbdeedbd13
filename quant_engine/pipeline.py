"""Threads that read, write and hash beside the one that computes, a bounded number of pieces ahead of it."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import chain
from threading import Event
from types import TracebackType
from typing import Self, TypeVar

Made = TypeVar("Made")
Beside = TypeVar("Beside")

AHEAD = max(3, min(8, os.cpu_count() or 1))
"""Pieces that are read before they are asked for, and threads that read and write."""


class Threads:
    """`pieces`: threads that read and write pieces and finish files. `files`: those that hash whole sources.

    When the block ends, nothing begins that has not begun, `stopped` is set, at which what takes long stops, and all
    threads have ended.
    """

    def __init__(self) -> None:
        self.pieces = ThreadPoolExecutor(AHEAD)
        self.files = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2))
        self.stopped = Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopped.set()
        for pool in (self.files, self.pieces):
            pool.shutdown(cancel_futures=True)


def ahead(
    jobs: Iterable[tuple[Callable[[], Made], Beside] | None], pool: Executor, count: int = AHEAD
) -> Iterator[tuple[Made, Beside]]:
    """What jobs return, in order, each with what came beside it; `count` more are begun before they are asked for.

    A None among the jobs holds them up: what comes after it is not even drawn from `jobs` before all results of what
    came before it were used. Raises what a job raised, in its place.
    """
    begun: deque[tuple[Future[Made], Beside]] = deque()
    for job in chain(jobs, [None]):
        if job is not None:
            begun.append((pool.submit(job[0]), job[1]))
        while len(begun) > (0 if job is None else count):
            future, beside = begun.popleft()
            yield future.result(), beside
