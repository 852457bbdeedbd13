"""Keys and values written in place are those of MLX's own cache, and never another cache's."""

import copy

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache

from quant_engine.token_store import append


def tokens(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((1, 2, count, 8)).astype(np.float32)


def test_it_holds_what_mlx_lms_own_update_would() -> None:
    ours, theirs = KVCache(), KVCache()
    for seed, count in enumerate((200, 1, 1, 100, 1)):
        new = tokens(count, seed), tokens(count, seed + 100)
        keys, values, length = append(ours, *new)
        theirs.update_and_fetch(*map(mx.array, new))
        assert length == ours.offset == theirs.offset
        assert np.array_equal(keys[:, :, :length], np.array(theirs.keys_and_values()[0]))
        assert np.array_equal(values[:, :, :length], np.array(ours.keys_and_values()[1]))


def test_a_copied_cache_goes_on_by_itself() -> None:
    first = KVCache()
    append(first, tokens(5, 0), tokens(5, 1))
    for branch in (copy.copy(first), copy.deepcopy(first)):
        append(branch, tokens(2, 2), tokens(2, 3))
        append(first, tokens(3, 4), tokens(3, 5))
        assert np.array_equal(np.array(branch.keys[:, :, 5:7]), tokens(2, 2))
        assert np.array_equal(np.array(first.keys[:, :, first.offset - 3 : first.offset]), tokens(3, 4))
        first.trim(3)


def test_dropped_tokens_stay_with_who_holds_their_array() -> None:
    cache = KVCache()
    append(cache, tokens(5, 0), tokens(5, 1))
    before = cache.keys
    cache.trim(3)
    append(cache, tokens(1, 2), tokens(1, 3))
    assert np.array_equal(np.array(before[:, :, :5]), tokens(5, 0))
    assert np.array_equal(np.array(cache.keys[:, :, :3]), np.concatenate([tokens(5, 0)[:, :, :2], tokens(1, 2)], 2))


def test_a_cache_filled_elsewhere_is_taken_over() -> None:
    cache = KVCache()
    cache.update_and_fetch(mx.array(tokens(4, 0)), mx.array(tokens(4, 1)))
    keys, _, length = append(cache, tokens(1, 2), tokens(1, 3))
    assert np.array_equal(keys[:, :, :length], np.concatenate([tokens(4, 0), tokens(1, 2)], 2))
