import os
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import pytest

from benchmarks import harness


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system keeps no thread on a core")
def test_a_thread_stays_on_the_core_that_counts_fastest_and_is_free_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = os.sched_getaffinity(0)
    fastest = max(cores)
    monkeypatch.setattr(harness, "_seconds_on", lambda core: 1.0 if core == fastest else 2.0)
    with pytest.raises(ZeroDivisionError), harness.fastest_core():
        assert os.sched_getaffinity(0) == {fastest}
        raise ZeroDivisionError
    assert os.sched_getaffinity(0) == cores


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system keeps no thread on a core")
def test_every_core_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    cores, tried = os.sched_getaffinity(0), list[int]()
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, chosen: tried.extend(chosen))
    with harness.fastest_core():
        pass
    assert set(tried[: len(cores)]) == cores
    assert tried[len(cores)] in cores
    assert set(tried[len(cores) + 1 :]) == cores


def test_turns_in_which_launching_is_slow_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = list[int]()

    @contextmanager
    def next_turn() -> Iterator[None]:
        turns.append(len(turns))
        yield

    def seconds(run: harness.Run, _: int) -> float:
        slow = 3 if len(turns) % 4 in (1, 2) else 1
        return slow * run(0).item() * 1e-6

    monkeypatch.setattr(harness, "on_gpu", lambda: True)
    monkeypatch.setattr(harness, "fastest_core", next_turn)
    monkeypatch.setattr(harness, "_graph", seconds)
    monkeypatch.setattr(harness, "_launch", lambda _: mx.array(4))
    assert harness.microseconds([lambda _: mx.array(5), lambda _: mx.array(9)], turns=8) == pytest.approx([5, 9])
    assert len(turns) == 8


def test_calls_wait_for_each_other_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    begun_with = list[float]()

    def step(x: mx.array, number: int) -> mx.array:
        begun_with.append(float(x.item()))
        return x + 1

    def seconds(run: harness.Run, calls: int) -> float:
        begun_with.clear()
        results = [float(run(number).item()) for number in range(calls)]
        assert results == [7.0 + harness.STEPS * (number + 1) for number in range(calls)]
        assert begun_with == [7.0 + number for number in range(harness.STEPS * calls)]
        return 6e-6 * harness.STEPS

    monkeypatch.setattr(harness, "on_gpu", lambda: True)
    monkeypatch.setattr(harness, "_graph", lambda run, calls: 1.0 if run is harness._launch else seconds(run, calls))
    assert harness.microseconds_in_turn([step, step], mx.array(7.0)) == pytest.approx([6, 6])


def test_calls_are_of_the_same_array_on_a_cpu() -> None:
    begun_with = list[float]()

    def step(x: mx.array, number: int) -> mx.array:
        begun_with.append(float(x.item()))
        return x + number

    assert len(harness.microseconds_in_turn([step], mx.array(7.0), calls=3)) == 1
    assert set(begun_with) == {7.0}


def test_what_an_array_begins_with_has_another_shape() -> None:
    assert harness.beginning(mx.arange(12).reshape(2, 6), (1, 2, 2)).tolist() == [[[0, 1], [2, 3]]]


def test_a_command_line_has_the_options() -> None:
    command = harness.command_of("convert", layers=8, file_mb=1000, bits=[4, 3])
    assert command == "python -m benchmarks.convert --layers 8 --file-mb 1000 --bits 4 3"
