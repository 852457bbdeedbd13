import threading

import anyio
import pytest

from quant_engine.progress import Progress
from tq_mcp.worker import Cancelled, Ticker, Worker

pytestmark = pytest.mark.anyio

Reports = list[tuple[float, float, str]]


def recorder(reports: Reports):
    async def report(progress: float, total: float, message: str) -> None:
        reports.append((progress, total, message))

    return report


async def sent(ticker: Ticker) -> Reports:
    reports: Reports = []
    await ticker.send(recorder(reports))
    return reports


async def test_the_result_comes_back() -> None:
    assert await Worker().run(lambda progress: 42, recorder([])) == 42


async def test_an_exception_comes_back_as_it_was() -> None:
    def work(progress: Progress) -> None:
        raise ValueError("told")

    with pytest.raises(ValueError, match="told"):
        await Worker().run(work, recorder([]))


async def test_the_last_report_always_arrives() -> None:
    reports: Reports = []
    await Worker().run(lambda progress: progress(3, 4, "layer 3"), recorder(reports))
    assert reports[-1] == (0.75, 1, "layer 3")


async def test_all_work_runs_on_one_thread_in_turn() -> None:
    worker, seen = Worker(), []

    async def run() -> None:
        seen.append(await worker.run(lambda progress: threading.get_ident(), recorder([])))

    async with anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(run)
    assert len(seen) == 5 and len(set(seen)) == 1 and threading.get_ident() not in seen


async def test_who_waits_is_told_so() -> None:
    worker, release, reports = Worker(), threading.Event(), []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(worker.run, lambda progress: release.wait(10), recorder([]))
        tasks.start_soon(worker.run, lambda progress: progress(1, 1, "done"), recorder(reports))
        while not reports:
            await anyio.sleep(0.01)
        release.set()
    assert "waiting" in reports[0][2] and reports[-1][2] == "done"


async def test_cancelling_stops_the_work_at_its_next_report_and_waits_for_its_clean_up() -> None:
    started, events = threading.Event(), []

    def work(progress: Progress) -> None:
        try:
            while True:
                progress(1, 2, "working")
                started.set()
        finally:
            events.append("cleaned up")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(Worker().run, work, recorder([]))
        await anyio.to_thread.run_sync(started.wait)
        tasks.cancel_scope.cancel()
    assert events == ["cleaned up"]


async def test_cancelled_work_that_has_not_begun_never_does() -> None:
    worker, release, ran = Worker(), threading.Event(), []
    async with anyio.create_task_group() as outer:
        outer.start_soon(worker.run, lambda progress: release.wait(10), recorder([]))
        await anyio.sleep(0.05)
        with anyio.move_on_after(0.05):
            await worker.run(lambda progress: ran.append(1), recorder([]))
        release.set()
    await worker.run(lambda progress: None, recorder([]))
    assert ran == []


async def test_a_closed_worker_takes_no_more() -> None:
    worker = Worker()
    worker.close()
    with pytest.raises(RuntimeError, match="closing down"):
        await worker.run(lambda progress: None, recorder([]))


def test_close_drops_what_waits_and_lets_work_at_hand_end() -> None:
    worker, started, release, ran = Worker(), threading.Event(), threading.Event(), []

    def at_hand() -> None:
        started.set()
        release.wait(10)
        ran.append("at hand")

    worker._submit(at_hand)
    waiting = worker._submit(lambda: ran.append("waiting"))
    started.wait(10)
    waiting.add_done_callback(lambda _: release.set())
    worker.close()
    assert waiting.cancelled() and ran == ["at hand"]


def test_the_thread_outlives_its_worker_so_that_a_process_ends_in_peace() -> None:
    before = set(threading.enumerate())
    worker = Worker()
    (thread,) = set(threading.enumerate()) - before
    worker.close()
    assert thread.is_alive() and thread.daemon


class TestTicker:
    async def test_phases_add_up_so_that_progress_never_falls(self) -> None:
        ticker, seen = Ticker(), []
        for done, total in [(0, 1), (1, 1), (10, 100), (100, 100), (0, 7), (7, 7)]:
            ticker(done, total, f"{done} of {total}")
            seen += await sent(ticker)
        values = [progress for progress, _, _ in seen]
        assert values == sorted(values) and len(set(values)) == len(values)
        assert values[-1] == 3.0
        assert all(progress <= total for progress, total, _ in seen)

    async def test_nothing_new_is_not_sent_twice(self) -> None:
        ticker = Ticker()
        ticker(1, 2, "half")
        assert len(await sent(ticker)) == 1
        assert await sent(ticker) == []

    async def test_a_note_is_sent_without_a_step_forward(self) -> None:
        ticker = Ticker()
        ticker(1, 2, "half")
        await sent(ticker)
        ticker.note("compiling")
        ((progress, _, message),) = await sent(ticker)
        assert message == "compiling" and 0.5 < progress < 0.51

    async def test_a_stopped_one_raises(self) -> None:
        ticker = Ticker()
        ticker.stop()
        with pytest.raises(Cancelled):
            ticker(1, 2, "half")

    async def test_a_total_that_is_not_known_yet_counts_as_nothing_done(self) -> None:
        ticker = Ticker()
        ticker(5, 0, "looking")
        assert await sent(ticker) == [(0.0, 1, "looking")]
