"""Bits go to the layers that need them, within the budget."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quant_engine import allocation
from quant_engine.allocation import LayerCost, allocate, spend
from quant_engine.config import QuantConfig
from quant_engine.convert import convert
from quant_engine.errors import RecipeError
from quant_engine.evaluate import evaluate
from quant_engine.source import resolve
from quant_engine.text import Text

COSTS = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=3),
    st.builds(LayerCost, st.integers(1, 10**6), st.floats(1e-6, 1.0)),
    min_size=1, max_size=12,
)  # fmt: skip


def average(widths: dict[str, int], costs: dict[str, LayerCost]) -> float:
    return sum(widths[p] * c.weights for p, c in costs.items()) / sum(c.weights for c in costs.values())


@given(COSTS, st.floats(2, 4))
def test_the_budget_is_kept_and_no_layer_that_fits_is_left_below_it(costs: dict[str, LayerCost], bits: float) -> None:
    widths = spend(costs, bits)
    assert set(widths.values()) <= {2, 3, 4}
    assert average(widths, costs) <= bits + 1e-9
    left = (bits - average(widths, costs)) * sum(c.weights for c in costs.values())
    least = min((c.weights for p, c in costs.items() if widths[p] == 2), default=float("inf"))
    assert least > left - 1e-6


@given(COSTS)
def test_the_ends_are_uniform(costs: dict[str, LayerCost]) -> None:
    assert set(spend(costs, 2).values()) == {2}
    assert set(spend(costs, 4).values()) == {4}


def test_what_costs_more_gets_more() -> None:
    costs = {"calm": LayerCost(100, 0.001), "delicate": LayerCost(100, 1.0), "usual": LayerCost(100, 0.03)}
    assert spend(costs, 3) == {"calm": 2, "delicate": 4, "usual": 3}


def test_the_choice_is_as_good_as_any_of_all() -> None:
    random = np.random.default_rng(0)
    costs = {name: LayerCost(1000, float(random.lognormal(-4, 1.5))) for name in "abcdef"}
    choices = ([2 + extra for extra in choice] for choice in np.ndindex(3, 3, 3, 3, 3, 3) if sum(choice) <= 6)
    best = min(sum(cost.at(b) for cost, b in zip(costs.values(), bits, strict=True)) for bits in choices)
    assert sum(costs[n].at(b) for n, b in spend(costs, 3).items()) == pytest.approx(best)


@pytest.mark.parametrize("target", [2.0, 4.5])
def test_a_target_out_of_reach_is_refused(demo_model: Path, target: float) -> None:
    with pytest.raises(RecipeError, match=rf"target_bpw is {target}; .* 2.25 to 4.25 bits"):
        allocate(resolve(demo_model), QuantConfig(), target)


def test_it_beats_one_width_for_all_at_the_same_size(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allocation, "WINDOWS", 4)
    mixed = allocate(resolve(demo_model), QuantConfig(), 3.25)
    text = Text.of("prose", (demo_model / "README.md").read_text() * 3)
    made = convert(demo_model, tmp_path / "mixed", config=mixed)
    assert made.bits_per_weight <= 3.25
    even = evaluate(demo_model, bits=(3,), text=text, seq_len=256, num_samples=8, affine=False, qjl=False).rows
    uneven = evaluate(tmp_path / "mixed", text=text, seq_len=256, num_samples=8, reference=demo_model, affine=False)
    assert uneven.rows[1].kl is not None and even[1].kl is not None
    assert uneven.rows[1].kl < even[1].kl


def test_writing_is_the_same_for_a_seed_and_differs_between_windows(demo_model: Path) -> None:
    model = allocation.load_source(resolve(demo_model), fuse=False)
    first = allocation.write_text(model)
    assert np.array_equal(first, allocation.write_text(model))
    assert first.shape == (allocation.WINDOWS, allocation.WINDOW_TOKENS)
    assert len({tuple(window) for window in first}) == len(first)
