import mlx.core as mx
import pytest

from quant_engine import pacing
from quant_engine.kv_cache import TurboQuantKVCache


def test_no_more_than_a_few_layers_of_a_prompt_are_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX would hold the activations of all of them."""
    begun, waited = list[int](), list[int]()
    monkeypatch.setattr(mx, "async_eval", lambda codes: begun.append(id(codes)))
    monkeypatch.setattr(mx, "eval", lambda codes: waited.append(id(codes)))
    layers = pacing.Layers()
    made = [mx.zeros((1, 2, tokens, 4), mx.uint32) for tokens in (pacing.LONG - 1, *[pacing.LONG] * 10)]
    for codes in made:
        layers.add(codes)
    assert begun == [id(codes) for codes in made[1:]]
    assert waited == begun[: 10 - 2 * pacing.AHEAD]


def test_a_cache_tells_of_each_long_step() -> None:
    pacing.under_way.made.clear()
    heads = mx.random.normal((1, 2, pacing.LONG, 64))
    TurboQuantKVCache().add(heads, heads)
    assert [codes.shape[2] for codes in pacing.under_way.made] == [pacing.LONG] * 2
