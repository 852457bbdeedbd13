import copy
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from quant_engine.config import CacheConfig
from quant_engine.errors import InputError, RecipeError
from quant_engine.kv_cache import TurboQuantKVCache, convert_cache_to_turboquant, load_cache, save_cache
from quant_engine.loader import load

TOKENS = mx.array([[(37 * i) % 2000 + 3 for i in range(300)]])


@pytest.fixture(scope="module")
def ours(demo_model: Path) -> tuple[nn.Module, Any]:
    return load(demo_model)


@pytest.fixture(scope="module")
def theirs(demo_model: Path) -> tuple[nn.Module, Any]:
    model, tokenizer, *_ = mlx_lm.load(str(demo_model))
    model.set_dtype(mx.float32)
    return model, tokenizer


def _heads(tokens: int, seed: int = 0, size: int = 64) -> tuple[mx.array, mx.array]:
    return (
        mx.random.normal((1, 2, tokens, size), key=mx.random.key(seed)),
        mx.random.normal((1, 2, tokens, size), key=mx.random.key(seed + 1)),
    )


def _divergence(model: nn.Module, cache: list[Any]) -> float:
    full = model(TOKENS)
    p, q = nn.log_softmax(full), nn.log_softmax(model(TOKENS, cache=cache))
    return (mx.exp(p) * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize(("k_bits", "v_bits"), [(8, 8), (8, 4), (4, 4), (3, 3), (2, 2)])
def test_bytes_are_those_of_the_formula(k_bits: int, v_bits: int) -> None:
    cache = TurboQuantKVCache(CacheConfig(k_bits, v_bits))
    cache.update_and_fetch(*_heads(300))
    token = 2 * ((64 * k_bits + 16) + (64 * v_bits + 16)) // 8
    assert cache.token_nbytes == 300 * token
    assert cache.nbytes == 512 * token


def test_more_bits_lose_less(ours: tuple[nn.Module, Any]) -> None:
    settings = [CacheConfig(8, 8), CacheConfig(8, 4), CacheConfig(4, 4), CacheConfig(3, 3), CacheConfig(2, 2)]
    lost = [_divergence(ours[0], [TurboQuantKVCache(c) for _ in range(4)]) for c in settings]
    assert lost == sorted(lost)
    assert lost[0] < 1e-3
    assert lost[-1] > 10 * lost[1]


def test_a_model_that_is_not_routed_gives_the_same(ours: tuple[nn.Module, Any], theirs: tuple[nn.Module, Any]) -> None:
    """From one filled cache, so that rounding of the keys cannot tip codes."""
    filled = [TurboQuantKVCache(CacheConfig(8, 8)) for _ in range(4)]
    ours[0](TOKENS, cache=filled)
    step = mx.array([[7]])
    routed = ours[0](step, cache=copy.deepcopy(filled))
    plain = theirs[0](step, cache=copy.deepcopy(filled))
    assert mx.allclose(routed, plain, atol=2e-2)


def test_mlx_lms_own_generation_takes_the_cache(theirs: tuple[nn.Module, Any]) -> None:
    model, tokenizer = theirs
    cache = convert_cache_to_turboquant(make_prompt_cache(model), tq_bits=3, group_size=64)
    text = mlx_lm.generate(model, tokenizer, "Once upon a time", max_tokens=12, prompt_cache=cache)
    assert text
    assert all(isinstance(c, TurboQuantKVCache) and c.offset > 12 for c in cache)


def test_a_filled_cache_is_converted_and_the_original_left_alone(ours: tuple[nn.Module, Any]) -> None:
    original = make_prompt_cache(ours[0])
    ours[0](TOKENS, cache=original)
    before = [mx.array(c.state[0]) for c in original]
    converted = convert_cache_to_turboquant(original, k_bits=8, v_bits=8)
    assert [c.offset for c in converted] == [300] * 4
    step = mx.array([[9]])
    assert mx.allclose(ours[0](step, cache=converted), ours[0](step, cache=copy.deepcopy(original)), atol=0.2)
    assert all(mx.array_equal(c.state[0], b) for c, b in zip(original, before, strict=True))


def test_layers_of_other_kinds_and_boundary_layers_stay() -> None:
    cache = [KVCache(), RotatingKVCache(max_size=8), KVCache(), KVCache()]
    converted = convert_cache_to_turboquant(cache, boundary_layers=1)
    assert [type(c) for c in converted] == [KVCache, RotatingKVCache, TurboQuantKVCache, KVCache]


def test_windows_in_full_precision_are_exact_and_the_middle_is_not() -> None:
    cache = TurboQuantKVCache(CacheConfig(2, 2, sink_tokens=4, recent_tokens=16))
    keys, values = _heads(100)
    for start in range(0, 100, 10):
        got_keys, got_values = cache.update_and_fetch(keys[:, :, start : start + 10], values[:, :, start : start + 10])
    for got, exact in ((got_keys, keys), (got_values, values)):
        assert mx.array_equal(got[:, :, :4], exact[:, :, :4])
        assert mx.array_equal(got[:, :, 84:], exact[:, :, 84:])
        error = mx.square(got - exact)[:, :, 4:84].mean().item()
        assert 0.05 < error < 0.2


@pytest.mark.parametrize("config", [CacheConfig(4, 4), CacheConfig(4, 4, sink_tokens=4, recent_tokens=16)])
def test_trimming_leaves_the_first_tokens_and_appending_goes_on(config: CacheConfig) -> None:
    cache, fresh = TurboQuantKVCache(config), TurboQuantKVCache(config)
    cache.update_and_fetch(*_heads(80))
    assert cache.trim(50) == 50
    assert cache.size() == 30
    keys, values = _heads(80)
    fresh.update_and_fetch(keys[:, :, :30], values[:, :, :30])
    assert mx.allclose(
        cache.update_and_fetch(*_heads(5, seed=3))[0][:, :, -5:],
        fresh.update_and_fetch(*_heads(5, seed=3))[0][:, :, -5:],
        atol=1e-5,
    )
    assert cache.trim(1000) == 35
    assert cache.empty()


def _attended(cache: TurboQuantKVCache, tokens: int, seed: int, in_place: bool) -> np.ndarray:
    """Attention of three new queries after adding tokens, in NumPy and in place, or by MLX."""
    keys, values = _heads(tokens, seed)
    queries = _heads(3, seed + 7)[0]
    if in_place:
        found = cache.attend_rows(*map(np.array, (queries, keys, values)), scale=0.125, mask="causal")
        assert found is not None
        return found
    cache.add(keys, values)
    return np.array(cache.attend(queries, scale=0.125, mask="causal"))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_tokens_written_in_place_are_those_that_mlx_would_add(bits: int) -> None:
    """In turns, over the room that one step gives, and after dropping tokens down to where the last was written."""
    both, alone = (TurboQuantKVCache(CacheConfig(bits, bits)) for _ in range(2))
    for seed, tokens in enumerate((250, 1, 9, 1, 300, 1)):
        found = _attended(both, tokens, seed, in_place=seed % 3 != 2)
        assert np.allclose(found, _attended(alone, tokens, seed, in_place=False), rtol=1e-3, atol=1e-4)
        if seed == 2:
            assert both.trim(9) == alone.trim(9)
    assert all(mx.array_equal(a, b) for a, b in zip(both.state[:4], alone.state[:4], strict=True))


def test_a_branch_of_a_cache_written_in_place_goes_on_by_itself() -> None:
    first = TurboQuantKVCache(CacheConfig(4, 4))
    _attended(first, 10, 0, in_place=True)
    branch = copy.deepcopy(first)
    first.trim(4)
    ours, theirs = _attended(first, 4, 3, in_place=True), _attended(branch, 4, 4, in_place=True)
    fresh = TurboQuantKVCache(CacheConfig(4, 4))
    fresh.add(*_heads(10, 0))
    assert np.allclose(theirs, _attended(fresh, 4, 4, in_place=False), rtol=1e-3, atol=1e-4)
    fresh.trim(8)
    assert np.allclose(ours, _attended(fresh, 4, 3, in_place=False), rtol=1e-3, atol=1e-4)


def test_tokens_in_full_precision_are_not_written_in_place() -> None:
    cache = TurboQuantKVCache(CacheConfig(4, 4, recent_tokens=2))
    assert cache.attend_rows(*[np.zeros((1, 2, 1, 64), np.float32)] * 3, scale=1.0, mask=None) is None
    assert cache.empty()


@pytest.mark.parametrize(
    "config", [CacheConfig(8, 4), CacheConfig(3, 2, sink_tokens=2, recent_tokens=8), CacheConfig()]
)
def test_a_saved_cache_stays_compressed_and_goes_on(
    tmp_path: Path, ours: tuple[nn.Module, Any], config: CacheConfig
) -> None:
    cache = [TurboQuantKVCache(config) for _ in range(4)]
    ours[0](TOKENS, cache=cache)
    save_cache(tmp_path / "cache.safetensors", cache)
    loaded = load_cache(tmp_path / "cache.safetensors")
    assert [c.config for c in loaded] == [config] * 4
    assert loaded[0].token_nbytes == cache[0].token_nbytes
    step = mx.array([[5, 6]])
    assert mx.array_equal(ours[0](step, cache=loaded), ours[0](step, cache=cache))


def test_a_file_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="is no saved prompt cache"):
        load_cache(tmp_path / "x.safetensors")


def test_heads_and_bits_that_do_not_fit_are_named() -> None:
    with pytest.raises(
        RecipeError, match="heads of 96 cannot be cached at 4 bits in groups of 64: group sizes that fit are 0, 32"
    ):
        TurboQuantKVCache(CacheConfig(4, 4)).update_and_fetch(*_heads(3, size=96))
    with pytest.raises(RecipeError, match="heads must be a multiple of 32 wide"):
        TurboQuantKVCache(CacheConfig(3, 3, group_size=0)).update_and_fetch(*_heads(3, size=8))
    with pytest.raises(RecipeError, match="k_bits"):
        convert_cache_to_turboquant([KVCache()], tq_bits=5)
    with pytest.raises(InputError, match="no layer's cache can be compressed"):
        convert_cache_to_turboquant([RotatingKVCache(max_size=8)])
    with pytest.raises(InputError, match="boundary_layers=1 keeps 2"):
        convert_cache_to_turboquant([KVCache(), KVCache()], boundary_layers=1)


def test_it_behaves_as_mlx_lms_caches_do() -> None:
    cache = TurboQuantKVCache()
    assert cache.empty() and cache.nbytes == 0 and cache.is_trimmable()
    assert cache.make_mask(1) is None
    assert cache.make_mask(4) == "causal"
    assert cache.make_mask(4, return_array=True).shape == (4, 4)


@pytest.mark.parametrize("in_place", [False, True])
def test_room_for_a_prompt_is_made_once(in_place: bool) -> None:
    cache = TurboQuantKVCache(CacheConfig(8, 4))

    def add(tokens: int) -> int:
        x = np.zeros((1, 2, tokens, 64), np.float32)
        if in_place:
            assert cache.attend_rows(x, x, x, scale=1.0, mask="causal") is not None
        else:
            cache.add(mx.array(x), mx.array(x))
        return cache.nbytes * cache.offset // cache.token_nbytes

    cache.reserve(1000)
    assert [add(tokens) for tokens in (300, 300, 400)] == [1024] * 3
    cache.reserve(3000)
    sizes = [add(tokens) for tokens in (100, 1000, 1900)]
    assert sizes == [1000 + 3072] * 3
    assert add(200) == 4000 + 256


def test_first_and_last_tokens_do_not_keep_the_cache_that_they_came_from() -> None:
    plain = KVCache()
    plain.update_and_fetch(*_heads(8192))
    mx.eval(plain.state)
    nbytes = plain.nbytes
    (compressed,) = convert_cache_to_turboquant([plain], sink_tokens=4, recent_tokens=4)
    assert isinstance(compressed, TurboQuantKVCache)
    mx.eval([part for part in compressed.state if isinstance(part, mx.array)])
    held = mx.get_active_memory()
    del plain
    assert held - mx.get_active_memory() >= nbytes


def test_a_cache_without_tokens_is_converted_and_takes_none() -> None:
    plain = KVCache()
    plain.update_and_fetch(*_heads(8))
    plain.trim(8)
    (compressed,) = convert_cache_to_turboquant([plain])
    assert compressed.empty()
    keys, _ = compressed.update_and_fetch(*_heads(0))
    assert keys.shape == (1, 2, 0, 64)
    compressed.update_and_fetch(*_heads(3))
    assert compressed.size() == 3
