"""What arrays are to be computed from, read off MLX's graph."""

import mlx.core as mx

from quant_engine.lineage import lineage


def given(*names: str) -> dict[str, mx.array]:
    return {name: mx.zeros((4, 4)) for name in names}


def test_an_array_needs_those_that_it_is_computed_from_however_far_away() -> None:
    parts = given("a", "b.weight", "c of c", "d")
    a, b, c, _ = parts.values()
    first, second = mx.split(mx.stack([a, b]), 2)
    made = {"stacked": mx.stack([a, c]), "first": first, "second": second + c[0], "alone": mx.ones(3) + 1}
    assert lineage(made, parts) == {
        "stacked": {"a", "c of c"},
        "first": {"a", "b.weight"},
        "second": {"a", "b.weight", "c of c"},
        "alone": set(),
    }


def test_two_names_of_one_array_need_the_same() -> None:
    parts = given("a", "b")
    both = parts["a"] + 1
    assert lineage({"x": both, "y": both}, parts) == {"x": {"a"}, "y": {"a"}}


def test_many_arrays_are_told_apart() -> None:
    parts = given(*(f"part{i}" for i in range(400)))
    made = {f"made{i}": parts[f"part{i % 400}"] * 2 + i for i in range(1300)}
    assert lineage(made, parts) == {f"made{i}": {f"part{i % 400}"} for i in range(1300)}


def test_where_something_was_computed_already_all_are_said_to_be_needed() -> None:
    parts = given("a", "b")
    x, y = parts["a"] + 1, parts["b"] + 1
    mx.eval(x)
    assert lineage({"x": x + 1, "y": y}, parts) == {"x": {"a", "b"}, "y": {"a", "b"}}
