"""Heavy work beside the event loop: one piece at a time, on one thread, stopped at its next progress report."""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any, TypeVar

import anyio

from metal_kernels import announce_compilation
from quant_engine.progress import Progress

T = TypeVar("T")
Report = Callable[[float, float, str], Awaitable[None]]
"""Told progress so far, the total, and a message; progress only ever grows."""
Piece = tuple["Future[Any]", Callable[[], Any]]

INTERVAL_S = 0.1
NUDGE = 1e-6
WAITING = "waiting for other work to finish"


class Cancelled(Exception):
    """Raised inside work that nobody waits for any more."""


class Worker:
    """One thread for all work on models.

    MLX ties its streams, and so the arrays of a loaded model, to the thread that made them; and the CPU kernels
    take all processors already. So pieces of work queue up. The thread is never ended, only left idle: when a
    thread ends, MLX frees what it kept for it with the interpreter's lock, and that aborts a process whose
    interpreter is closing down.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[Piece] = SimpleQueue()
        self._closed = False
        Thread(target=_work_through, args=(self._queue,), name="models", daemon=True).start()

    async def run(self, work: Callable[[Progress], T], report: Report) -> T:
        """Run `work` with a progress callback and return its result.

        Where the caller is cancelled, the callback raises Cancelled the next time it is called, and `run` ends
        when the work has cleaned up. Raises RuntimeError once closed.
        """
        ticker = Ticker()
        future = self._submit(lambda: _announced(work, ticker))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_forward, ticker, report)
            await _settled(future, ticker)
            tasks.cancel_scope.cancel()
        await ticker.send(report)
        return future.result()

    def close(self) -> None:
        """Drop what waits, and wait for work at hand to end."""
        with suppress(Empty):
            while True:
                self._queue.get_nowait()[0].cancel()
        at_hand = self._submit(lambda: None)
        self._closed = True
        at_hand.result()

    def _submit(self, work: Callable[[], T]) -> "Future[T]":
        if self._closed:
            raise RuntimeError("the server is closing down")
        future: Future[T] = Future()
        self._queue.put((future, work))
        return future


def _work_through(queue: "SimpleQueue[Piece]") -> None:
    while True:
        future, work = queue.get()
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
        del future, work  # or an idle thread would hold a result's memory


class Ticker:
    """The progress callback: remembers the latest report, and stops the work when asked to.

    Work comes in phases, each of which counts its own (bytes fetched, bytes converted). What is passed on is
    the number of finished phases and the fraction of this one, which never falls.
    """

    def __init__(self) -> None:
        self._stop = Event()
        self._finished, self._fraction, self._total = 0, 0.0, 0
        self._message = WAITING
        self._sent: tuple[float, str] | None = None

    def __call__(self, done: int, total: int, message: str) -> None:
        if self._stop.is_set():
            raise Cancelled
        fraction = min(1.0, done / total) if total > 0 else 0.0
        if total != self._total or fraction < self._fraction:
            self._finished += 1 if self._fraction > 0 else 0
            self._total = total
        self._fraction, self._message = fraction, message

    def note(self, message: str) -> None:
        """Tell something that is no step forward."""
        self._message = message

    def stop(self) -> None:
        """Raise Cancelled in the work at its next report."""
        self._stop.set()

    async def send(self, report: Report) -> None:
        """Pass the latest on, unless it was passed on already."""
        progress, message = self._finished + self._fraction, self._message
        if self._sent is not None:
            if progress <= self._sent[0] and message == self._sent[1]:
                return
            progress = max(progress, self._sent[0] + NUDGE)
        self._sent = (progress, message)
        await report(progress, max(progress, self._finished + 1), message)


def _announced(work: Callable[[Progress], T], ticker: Ticker) -> T:
    ticker.note("starting")
    with announce_compilation(ticker.note):
        return work(ticker)


async def _forward(ticker: Ticker, report: Report) -> None:
    while True:
        await anyio.sleep(INTERVAL_S)
        await ticker.send(report)


async def _settled(future: "Future[T]", ticker: Ticker) -> None:
    """Wait until the work ended, one way or the other; if cancelled, stop it first."""
    loop, ended = asyncio.get_running_loop(), anyio.Event()
    future.add_done_callback(lambda _: loop.call_soon_threadsafe(ended.set))
    try:
        await ended.wait()
    except anyio.get_cancelled_exc_class():
        ticker.stop()
        future.cancel()
        with anyio.CancelScope(shield=True):
            await ended.wait()
        raise
