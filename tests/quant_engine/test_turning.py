"""Matrices are turned piece by piece, along their rows or their outputs."""

import sys

import mlx.core as mx
import pytest

from quant_engine.turning import Turning

WEIGHT = mx.random.normal((12, 20), key=mx.random.key(1))
BACKWARDS = Turning(frozenset({"row"}), frozenset({"output"}), lambda rows: rows[:, ::-1])


def read(first: int, last: int) -> mx.array:
    return WEIGHT[first:last]


@pytest.mark.parametrize("values", [7, 50, 10_000])
def test_outputs_rows_or_nothing_is_turned_whatever_the_pieces(monkeypatch: pytest.MonkeyPatch, values: int) -> None:
    monkeypatch.setattr(sys.modules["quant_engine.turning"], "CHUNK_VALUES", values)
    for name, expected in (("output", WEIGHT[::-1]), ("row", WEIGHT[:, ::-1]), ("other", WEIGHT)):
        pieces = [BACKWARDS.rows(name, (12, 20), read, first, first + 4) for first in (0, 4, 8)]
        assert mx.array_equal(mx.concatenate(pieces), expected)
    assert "row" in BACKWARDS and "output" in BACKWARDS and "other" not in BACKWARDS


def test_a_matrix_whose_outputs_are_turned_is_read_once_until_another_is_asked_for() -> None:
    reads: list[int] = []

    def counted(first: int, last: int) -> mx.array:
        reads.append(first)
        return WEIGHT[first:last]

    turning = Turning(frozenset(), frozenset({"a", "b"}), lambda rows: rows)
    for name in ("a", "a", "b", "b", "a"):
        turning.rows(name, (12, 20), counted, 0, 1)
    assert reads == [0, 0, 0]
