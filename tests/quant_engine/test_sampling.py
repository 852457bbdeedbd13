"""Sampling controls: what they let through, and what is refused."""

import math
from collections import Counter
from typing import Any

import mlx.core as mx
import pytest

from quant_engine.errors import InputError
from quant_engine.sampling import Sampling

PROBABILITIES = [0.5, 0.3, 0.15, 0.05]
LOGPROBS = mx.log(mx.array([PROBABILITIES]))


def drawn(sampling: Sampling, times: int = 300) -> Counter[int]:
    sampler = sampling.sampler(vocabulary=4)
    return Counter(int(sampler(LOGPROBS).item()) for _ in range(times))


def test_temperature_zero_takes_the_most_likely() -> None:
    assert drawn(Sampling(), 5) == {0: 5}


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16], ids=str)
@pytest.mark.parametrize("temperature", [1e-45, 1e-39, 1e-38, 1e-31, 1e-29, 1e-10])
def test_a_temperature_near_zero_takes_the_most_likely_too(temperature: float, dtype: mx.Dtype) -> None:
    sampler = Sampling(temperature=temperature).sampler(1000)
    logits = mx.zeros((1, 1000), dtype).at[0, 7].add(0.1)
    assert {int(sampler(logits).item()) for _ in range(5)} == {7}


def test_a_seed_repeats_a_run_and_another_does_not() -> None:
    def run(seed: int) -> list[Any]:
        sampler = Sampling(temperature=1.0, seed=seed).sampler(4)
        return [sampler(LOGPROBS).item() for _ in range(50)]

    assert run(5) == run(5)
    assert run(5) != run(6)


def test_temperature_one_draws_as_the_model_predicts() -> None:
    counts = drawn(Sampling(temperature=1.0, seed=1), 2000)
    for token, probability in enumerate(PROBABILITIES):
        assert counts[token] / 2000 == pytest.approx(probability, abs=0.04)


@pytest.mark.parametrize(
    ("controls", "kept"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.75}, {0, 1}),
        ({"min_p": 0.25}, {0, 1, 2}),
        ({"top_k": 9}, {0, 1, 2, 3}),
    ],
    ids=["top k", "top p", "min p", "top k beyond the vocabulary"],
)
def test_controls_narrow_the_choice(controls: dict[str, Any], kept: set[int]) -> None:
    assert set(drawn(Sampling(temperature=1.0, seed=2, **controls))) == kept


def test_a_repetition_penalty_reaches_into_the_prompt_as_far_as_mlx_lm() -> None:
    (process,) = Sampling(repetition_penalty=2.0).processors(list(range(30)))
    logits = process(mx.array([31], dtype=mx.int32), mx.ones((1, 40)))
    changed = [i for i, value in enumerate(logits[0].tolist()) if value != 1.0]
    assert changed == [*range(11, 30), 31]
    assert logits[0, 31].item() == 0.5


@pytest.mark.parametrize("penalty", [None, 1.0])
def test_no_penalty_changes_nothing(penalty: float | None) -> None:
    assert Sampling(repetition_penalty=penalty).processors([1, 2]) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("seed", -1),
        ("seed", 2**64),
    ],
)
def test_values_out_of_range_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"^{name} is .*; it must be"):
        Sampling(**{name: value})  # pyright: ignore[reportArgumentType]
