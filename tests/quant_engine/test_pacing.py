import mlx.core as mx
import pytest

from quant_engine import pacing
from quant_engine.kv_cache import TurboQuantKVCache


def test_no_more_than_a_few_layers_of_a_prompt_are_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX would hold the activations of all of them."""
    begun, waited = list[int](), list[int]()
    monkeypatch.setattr(mx, "async_eval", lambda last: begun.append(last.item()))
    monkeypatch.setattr(mx, "eval", lambda last: waited.append(last.item()))
    layers = pacing.Layers()
    for number in range(11):
        layers.add(mx.full((1, 2, pacing.LONG - (number == 0), 4), number, mx.uint32))
    assert begun == list(range(1, 11))
    assert waited == begun[: 10 - 2 * pacing.AHEAD]


def test_a_cache_tells_of_each_long_step_and_nothing_keeps_what_it_held() -> None:
    pacing.under_way.made.clear()
    heads = mx.random.normal((1, 2, pacing.LONG, 64))
    cache = TurboQuantKVCache()
    cache.add(heads, heads)
    assert len(pacing.under_way.made) == 2
    mx.eval(cache.state[:4])
    mx.clear_cache()
    held = mx.get_active_memory()
    nbytes = cache.token_nbytes
    del cache
    assert held - mx.get_active_memory() >= nbytes
