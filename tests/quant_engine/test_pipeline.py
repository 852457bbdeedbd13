import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from quant_engine.pipeline import Threads, ahead


def job(number: int) -> tuple[Callable[[], int], str]:
    return partial(int, number), str(number)


def test_results_come_in_order_with_what_came_beside_them() -> None:
    with ThreadPoolExecutor(4) as pool:
        assert list(ahead(map(job, range(20)), pool, 3)) == [(number, str(number)) for number in range(20)]
        assert list(ahead([], pool)) == []


def test_no_more_jobs_than_stated_are_drawn_before_their_time() -> None:
    drawn: list[int] = []

    def jobs() -> Iterator[tuple[Callable[[], int], str]]:
        for number in range(10):
            drawn.append(number)
            yield job(number)

    with ThreadPoolExecutor(4) as pool:
        results = ahead(jobs(), pool, 3)
        assert drawn == []
        for number, _ in results:
            assert drawn[-1] == min(9, number + 3)


def test_none_holds_up_what_comes_after_it() -> None:
    used: list[int] = []

    def jobs() -> Iterator[tuple[Callable[[], int], str] | None]:
        yield None
        yield from map(job, range(5))
        yield None
        assert used == [0, 1, 2, 3, 4]
        yield job(5)

    with ThreadPoolExecutor(4) as pool:
        for number, _ in ahead(jobs(), pool, 3):
            used.append(number)
    assert used == [0, 1, 2, 3, 4, 5]


def test_an_error_comes_in_its_place() -> None:
    jobs = [job(0), job(1), (partial(int, "two"), "2"), job(3)]
    used: list[int] = []
    with ThreadPoolExecutor(4) as pool, pytest.raises(ValueError, match="'two'"):
        for number, _ in ahead(jobs, pool):
            used.append(number)
    assert used == [0, 1]


def test_when_the_block_ends_what_goes_on_is_told_to_stop_and_nothing_else_begins() -> None:
    before = threading.active_count()
    begun: list[int] = []

    def wait(number: int, stopped: threading.Event) -> None:
        begun.append(number)
        stopped.wait()

    with pytest.raises(KeyboardInterrupt), Threads() as threads:
        waiting = [threads.files.submit(wait, number, threads.stopped) for number in range(1000)]
        raise KeyboardInterrupt
    assert all(future.done() for future in waiting) and len(begun) < 1000
    assert threading.active_count() == before
