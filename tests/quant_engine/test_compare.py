"""Comparing caches: what progress tells, and where it stops the work."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.nn as nn
import pytest

from quant_engine.compare import compare_caches
from quant_engine.config import CacheConfig
from quant_engine.loader import load
from quant_engine.prompt import prompt_tokens

PROMPT = "The history of the city begins in" * 10
NEW_TOKENS = 5
CACHES = [CacheConfig(8, 4), CacheConfig(4, 4)]


@pytest.fixture(scope="module")
def loaded(demo_model: Path) -> tuple[nn.Module, Any]:
    return load(demo_model)


def test_progress_counts_what_each_cache_reads_and_makes_up_to_all(loaded: tuple[nn.Module, Any]) -> None:
    seen: list[tuple[int, int, str]] = []
    compare_caches(*loaded, PROMPT, max_tokens=NEW_TOKENS, caches=CACHES, progress=lambda *s: seen.append(s))
    each = len(prompt_tokens(loaded[1], PROMPT)) + NEW_TOKENS
    assert {total for _, total, _ in seen} == {3 * each}
    done = [done for done, _, _ in seen]
    assert done[-1] == 3 * each and all(before < after for before, after in pairwise(done))
    for number, name in enumerate(["full precision", *(cache.title for cache in CACHES)]):
        own = [entry for entry in seen if number * each < entry[0] < (number + 1) * each]
        assert [message for _, _, message in own][-NEW_TOKENS:] == [f"{name}: writing"] * NEW_TOKENS
        assert own[0][2] == f"{name}: reading the prompt"


def test_an_exception_from_progress_stops_inside_a_cache(loaded: tuple[nn.Module, Any]) -> None:
    seen: list[str] = []

    def stop(done: int, total: int, message: str) -> None:
        seen.append(message)
        if message == "full precision: writing":
            raise InterruptedError

    with pytest.raises(InterruptedError):
        compare_caches(*loaded, PROMPT, max_tokens=NEW_TOKENS, caches=CACHES, progress=stop)
    assert seen.count("full precision: writing") == 1
