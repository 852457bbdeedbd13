"""A model's layers in one call on a GPU or an emulated one, token after token, against the layers one by one."""

import copy
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache, load_prompt_cache, save_prompt_cache

from metal_kernels import Heads, Norm
from metal_kernels.gpu import decode_attention
from quant_engine import mlx_lm_adapter as adapter
from quant_engine import model_step, waiting_cache
from quant_engine.config import CacheConfig
from quant_engine.gpu_step import GpuStep
from quant_engine.kv_cache import TurboQuantKVCache, convert_cache_to_turboquant, load_cache, save_cache
from quant_engine.model_step import ModelStep, fuse_model
from quant_engine.stream_ends import UnrotatedNorm
from quant_engine.waiting_cache import Waiting, can_be_lent, lend, same_length
from tests.metal_kernels.host.machine import on_machine
from tests.quant_engine.checkpoints import CONFIG
from tests.quant_engine.test_gpu_step import HEADS, KV_HEADS, SCALE, SIZE, WIDTH, Layer

PROMPT = 3
OWN = Heads(HEADS, KV_HEADS, SIZE, SCALE, None)


@pytest.fixture(scope="module")
def layers() -> list[Layer]:
    return [Layer.of(1), Layer.of(2)]


def caches(dtype: mx.Dtype = mx.float16) -> list[KVCache]:
    """Two that hold the keys and values of PROMPT tokens."""
    made = [KVCache(), KVCache()]
    for i, cache in enumerate(made):
        tokens = mx.random.normal((2, 1, KV_HEADS, PROMPT, SIZE), key=mx.random.key(i)).astype(dtype)
        cache.update_and_fetch(tokens[0], tokens[1])
    return made


def tokens(count: int) -> list[mx.array]:
    return [mx.random.normal((1, 1, WIDTH), key=mx.random.key(i)).astype(mx.float16) for i in range(count)]


@pytest.fixture
def few_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for two tokens to wait, so that of three some are written meanwhile."""
    monkeypatch.setattr(decode_attention, "WAITING", 2)
    monkeypatch.setattr(waiting_cache, "WAITING", 2)
    monkeypatch.setattr(model_step, "has_kernel", lambda _: True)


def decoded(layers: list[Layer], own: list[Any]) -> list[mx.array]:
    """The model's outputs for three tokens, by a step over these caches."""
    step = ModelStep([layer.tiles for layer in layers], Norm(mx.ones(WIDTH, mx.float16), 1e-5))
    made = list[mx.array]()
    for x in tokens(3):
        assert step.takes(x, own)
        made.append(step(x, own))
    return made


def check(layers: list[Layer], found: list[mx.array], tolerance: float) -> list[KVCache]:
    """Compare outputs with those of the layers one by one; their caches then."""
    plain = caches(mx.float32)
    for x, y in zip(tokens(3), found, strict=True):
        right = layers[1].plain(layers[0].plain(x.astype(mx.float32), plain[0]), plain[1])
        right = mx.fast.rms_norm(right, None, 1e-5)
        assert mx.abs(y - right).max() < tolerance * mx.abs(right).max()
    return plain


@pytest.mark.usefixtures("few_wait")
def test_a_model_in_one_call_equals_its_layers_one_by_one(tmp_path: Path, layers: list[Layer]) -> None:
    held: list[tuple[int, mx.array, mx.array]] = []

    def run() -> list[mx.array]:
        own = caches()
        made = decoded(layers, own)
        held[:] = [(cache.offset, *cache.keys_and_values()) for cache in own]
        return made

    plain = check(layers, on_machine(tmp_path, run), 5e-3)
    for (length, keys, values), cache in zip(held, plain, strict=True):
        assert length == cache.offset == PROMPT + 3
        for ours, theirs in zip((keys, values), cache.keys_and_values(), strict=True):
            assert mx.abs(ours - theirs).max() < 1e-2


@pytest.mark.usefixtures("few_wait")
def test_the_same_over_compressed_caches_and_plain_ones(tmp_path: Path, layers: list[Layer]) -> None:
    def run() -> list[mx.array]:
        packed = convert_cache_to_turboquant(caches(), tq_bits=8, group_size=0)
        return decoded(layers, [packed[0], caches()[1]])

    check(layers, on_machine(tmp_path, run), 2e-2)


def lent(waits: int, cache: Any = None) -> Any:
    """A cache, or one of PROMPT tokens, and `waits` that wait, all ones, then twos, and so on."""
    made = lend(cache or caches()[0], OWN, mx.float16)
    for number in range(1, waits + 1):
        kept, at = made.arrays[0], mx.arange(decode_attention.WAITING) == number - 1
        waiting = mx.where(at[:, None], number, OWN.waiting(kept, 1)).astype(mx.float16)
        made.join(mx.concatenate([OWN.seen(kept, 1).reshape(-1), waiting.reshape(-1)]))
    return made


def compressed() -> TurboQuantKVCache:
    [cache] = convert_cache_to_turboquant(caches()[:1], k_bits=8, v_bits=4, group_size=0)
    return cache


def test_whoever_asks_a_lent_cache_for_its_content_gets_all_of_it(tmp_path: Path) -> None:
    plain = caches()[0]
    for number in (1, 2):
        plain.update_and_fetch(*(mx.full((1, KV_HEADS, 1, SIZE), number, mx.float16) for _ in range(2)))
    expected = plain.keys_and_values()

    def same(cache: KVCache, length: int = PROMPT + 2) -> None:
        assert cache.offset == length
        for ours, theirs in zip(cache.keys_and_values(), expected, strict=True):
            assert mx.array_equal(ours, theirs[:, :, :length])

    same(lent(2))
    same(copy.deepcopy(lent(2)))
    shorter = lent(2)
    assert shorter.trim(1) == 1
    same(shorter, PROMPT + 1)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), [lent(2)])
    same(load_prompt_cache(str(tmp_path / "cache.safetensors"))[0])
    longer = lent(1)
    keys, _ = longer.update_and_fetch(*(mx.full((1, KV_HEADS, 1, SIZE), 2, mx.float16) for _ in range(2)))
    assert mx.array_equal(keys, expected[0])
    same(longer)
    [compressed] = convert_cache_to_turboquant([lent(2)], tq_bits=4, group_size=0)
    assert compressed.offset == PROMPT + 2
    replaced = lent(1)
    replaced.state = plain.state
    assert type(replaced) is KVCache
    same(replaced)


def test_a_branch_of_a_lent_cache_goes_on_by_itself() -> None:
    one = lent(1)
    two = copy.deepcopy(one)
    assert isinstance(two, Waiting)
    one.join(one.arrays[0] + 1)
    assert (one.waits, two.waits) == (2, 1)
    two.end()
    assert (type(two), two.offset) == (KVCache, PROMPT + 1)


def test_room_grows_by_a_share_of_what_is_there() -> None:
    cache = KVCache()
    cache.update_and_fetch(*(mx.zeros((1, KV_HEADS, 2048, SIZE)) for _ in range(2)))
    for _ in range(decode_attention.WAITING + 1):
        own = lend(cache, OWN, mx.float32)
        own.join(own.arrays[0])
    assert cache.keys.shape[2] == 2048 + 256
    assert waiting_cache._growth(16384) == 2048  # pyright: ignore[reportPrivateUsage]


def test_whoever_asks_a_lent_compressed_cache_gets_all_of_it(tmp_path: Path) -> None:
    plain = compressed()
    for number in (1, 2):
        plain.add(*(mx.full((1, KV_HEADS, 1, SIZE), number, mx.float16) for _ in range(2)))

    def same(cache: TurboQuantKVCache, length: int = PROMPT + 2) -> None:
        assert cache.offset == length
        expected = copy.deepcopy(plain)
        expected.trim(plain.offset - length)
        for ours, theirs in zip(cache.state, expected.state, strict=True):
            assert mx.array_equal(ours, theirs) if isinstance(ours, mx.array) else ours == theirs

    same(lent(2, compressed()))
    same(copy.deepcopy(lent(2, compressed())))
    shorter = lent(2, compressed())
    assert shorter.trim(1) == 1
    same(shorter, PROMPT + 1)
    save_cache(tmp_path / "cache.safetensors", [lent(2, compressed())])
    same(load_cache(tmp_path / "cache.safetensors")[0])
    longer = lent(1, compressed())
    longer.add(*(mx.full((1, KV_HEADS, 1, SIZE), 2, mx.float16) for _ in range(2)))
    same(longer)
    queries = mx.random.normal((1, HEADS, 1, SIZE))
    seen = [cache.attend(queries, scale=SCALE, mask=None) for cache in (lent(2, compressed()), plain)]
    assert mx.array_equal(*seen)
    assert lent(2, compressed()).nbytes == plain.nbytes


def test_a_step_takes_plain_caches_of_one_length_and_one_token(
    layers: list[Layer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_step, "has_kernel", lambda _: True)
    step = ModelStep([layer.tiles for layer in layers], Norm(mx.ones(WIDTH, mx.float16), 1e-5))
    [x] = tokens(1)
    assert step.takes(x, caches())
    assert step.takes(x, convert_cache_to_turboquant(caches(), tq_bits=4, group_size=0))
    other = [*caches()[:1], caches()[1]]
    other[1].trim(1)
    nothing = caches()
    for cache in nothing:
        cache.trim(PROMPT)
    refused = {
        "no cache": (x, None), "empty caches": (x, [KVCache(), KVCache()]), "unequal": (x, other),
        "two tokens": (mx.concatenate([x, x], axis=1), caches()), "float32": (x.astype(mx.float32), caches()),
        "caches in float32": (x, caches(mx.float32)),
        "nothing held": (x, nothing), "a cache more": (x, [*caches(), KVCache()]),
        "another batch": (mx.concatenate([x, x]), caches()),
        "a window": (x, convert_cache_to_turboquant(caches(), tq_bits=4, group_size=0, sink_tokens=1)),
    }  # fmt: skip
    for name, (given, own) in refused.items():
        assert not step.takes(given, own), name
    assert not same_length([lent(0), caches()[1], lent(1)])


def test_tokens_dropped_behind_a_lent_caches_back_are_gone() -> None:
    cache = lent(3)
    cache.offset -= 2
    assert can_be_lent(cache, OWN, 1, mx.float16)
    assert type(cache) is KVCache
    again = lent(1, cache)
    again.end()
    assert cache.keys_and_values()[0][0, 0, PROMPT:, 0].tolist() == [1, 1]


def test_a_cache_that_was_lent_for_other_heads_is_not_taken_for_these() -> None:
    others = {
        "heads": (Heads(2 * HEADS, KV_HEADS, SIZE, SCALE, None), 1, mx.float16), "a batch": (OWN, 2, mx.float16),
        "a dtype": (OWN, 1, mx.bfloat16),
    }  # fmt: skip
    for name, (heads, batch, dtype) in others.items():
        cache = lent(1)
        assert can_be_lent(cache, heads, batch, dtype) == (name == "heads"), name
        assert type(cache) is KVCache


def test_a_window_of_recent_tokens_is_kept_though_it_is_empty_now() -> None:
    cache = TurboQuantKVCache(CacheConfig(8, 8, 0, 0, 4))
    cache.add(*(mx.ones((1, KV_HEADS, 20, SIZE), mx.float16) for _ in range(2)))
    cache.trim(4)
    assert not can_be_lent(cache, OWN, 1, mx.float16)


@pytest.mark.parametrize("make", [caches, lambda: [compressed()]], ids=["plain", "compressed"])
def test_an_error_while_tokens_are_taken_in_loses_none(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = lent(2, make()[0])

    def fail(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "update_and_fetch", fail)
        patch.setattr(TurboQuantKVCache, "_settle", fail)
        with pytest.raises(MemoryError):
            cache.end()
    assert isinstance(cache, Waiting) and cache.waits == 2 and cache.offset == PROMPT + 2
    cache.end()
    assert cache.offset == PROMPT + 2
    assert type(cache) in (KVCache, TurboQuantKVCache)


def test_a_model_whose_norm_turns_values_back_keeps_its_own_call(layers: list[Layer]) -> None:
    sizes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": SIZE}
    plain, turning = (cast(Any, adapter.build(CONFIG | sizes | {"num_hidden_layers": 2})) for _ in range(2))
    turning.model.norm = UnrotatedNorm(turning.model.norm, mx.ones(WIDTH), WIDTH)
    for model in (plain, turning):
        for block, layer in zip(model.layers, layers, strict=True):
            block._step = GpuStep(layer.tiles)
    assert fuse_model(plain)
    assert not fuse_model(turning)
