"""Generation: mlx-lm's own tokens, where it stops, what it reports, and what it refuses."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest

import metal_kernels
from quant_engine.config import CacheConfig
from quant_engine.errors import InputError
from quant_engine.generate import (
    READING,
    WRITING,
    Continuation,
    continue_prompt,
    generate,
    make_cache,
    rate,
    read_prompt,
)
from quant_engine.loader import load
from quant_engine.prompt import prompt_tokens

PROMPT = "The city lies on the river and"
CHUNK = 512 if metal_kernels.device() == "cpu" else 2048
WIDE_KEYS = 64
"""Head size of the demo model, the smallest that a compressed cache takes at group 64."""


@pytest.fixture(scope="module")
def loaded(demo_model: Path) -> tuple[nn.Module, Any]:
    return load(demo_model)


def greedy_of_mlx_lm(folder: Path, prompt: str, max_tokens: int) -> list[int]:
    model: Any
    model, tokenizer, *_ = mlx_lm.load(str(folder))
    model.set_dtype(mx.float32)
    return [r.token for r in mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=max_tokens)]


def test_greedy_tokens_are_those_of_mlx_lm(demo_model: Path, loaded: tuple[nn.Module, Any]) -> None:
    result = generate(*loaded, PROMPT, max_tokens=24)
    assert result.token_ids == greedy_of_mlx_lm(demo_model, PROMPT, 24)
    assert result.text == loaded[1].decode(result.token_ids).lstrip()


def test_greedy_tokens_of_another_architecture_are_those_of_mlx_lm(shared_models: Path) -> None:
    folder = shared_models / "stories260k"
    prompt = "Once upon a time there was a"
    result = generate(*load(folder), prompt, max_tokens=60)
    expected = greedy_of_mlx_lm(folder, prompt, 60)
    assert result.token_ids == expected[: len(result.token_ids)]
    assert len(result.token_ids) >= len(expected) - 1  # mlx-lm's list has the end token


def test_pieces_of_text_come_as_they_are_made(loaded: tuple[nn.Module, Any]) -> None:
    pieces: list[str] = []
    result = generate(*loaded, PROMPT, max_tokens=12, on_text=pieces.append)
    assert "".join(pieces) == result.text
    assert len(pieces) > 3 and all(pieces)


def test_an_exception_from_the_listener_ends_generation(loaded: tuple[nn.Module, Any]) -> None:
    pieces: list[str] = []

    def stop(piece: str) -> None:
        pieces.append(piece)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        generate(*loaded, PROMPT, max_tokens=50, on_text=stop)
    assert len(pieces) == 1
    assert generate(*loaded, PROMPT, max_tokens=2).generation_tokens == 2


def test_progress_counts_the_prompt_by_chunks_and_every_new_token(loaded: tuple[nn.Module, Any]) -> None:
    seen: list[tuple[int, int, str]] = []
    result = generate(*loaded, PROMPT * 80, max_tokens=3, progress=lambda *s: seen.append(s))
    read = result.prompt_tokens - 1
    chunks = [0, *range(CHUNK, read, CHUNK), read]
    expected = [(done, READING) for done in chunks] + [(read + made, WRITING) for made in (1, 2, 3)]
    assert seen == [(done, read + 3, message) for done, message in expected]


def test_reading_a_prompt_can_be_stopped_between_its_chunks(loaded: tuple[nn.Module, Any]) -> None:
    def stop(count: int) -> None:
        raise InterruptedError

    cache = make_cache(loaded[0], None)
    with pytest.raises(InterruptedError):
        read_prompt(loaded[0], [5] * (CHUNK + 100), cache, stop)
    assert cache[0].offset == CHUNK


def test_tokens_without_text_are_counted_and_can_be_stopped(
    loaded: tuple[nn.Module, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []

    def stop(count: int) -> None:
        counted.append(count)
        if len(counted) == 4:
            raise InterruptedError

    model, tokenizer = loaded
    monkeypatch.setattr(type(tokenizer.detokenizer), "last_segment", "")
    cache, tokens = make_cache(model, None), prompt_tokens(tokenizer, PROMPT)
    read_prompt(model, tokens[:-1], cache)
    with pytest.raises(InterruptedError):
        continue_prompt(model, tokenizer, tokens, cache, 9, on_text=lambda _: pytest.fail("text"), on_tokens=stop)
    assert counted == [1, 1, 1, 1]


def test_an_end_token_stops_and_is_left_out(loaded: tuple[nn.Module, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = loaded
    free = generate(model, tokenizer, PROMPT, max_tokens=10)
    end = free.token_ids[6]
    monkeypatch.setattr(tokenizer, "_eos_token_ids", {end})
    stopped = generate(model, tokenizer, PROMPT, max_tokens=10)
    first = free.token_ids.index(end)
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[:first]
    assert stopped.text == tokenizer.decode(free.token_ids[:first]).lstrip()
    assert free.finish_reason == "length"


def test_a_seed_repeats_what_was_sampled(loaded: tuple[nn.Module, Any]) -> None:
    def run(seed: int) -> list[int]:
        return generate(*loaded, PROMPT, max_tokens=12, temperature=1.0, top_p=0.95, top_k=50, seed=seed).token_ids

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_a_repetition_penalty_changes_what_follows(loaded: tuple[nn.Module, Any]) -> None:
    plain = generate(*loaded, PROMPT, max_tokens=20)
    penalized = generate(*loaded, PROMPT, max_tokens=20, repetition_penalty=1.5)
    assert plain.token_ids != penalized.token_ids
    assert len(set(penalized.token_ids)) > len(set(plain.token_ids))


def test_no_step_is_computed_in_vain(loaded: tuple[nn.Module, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = loaded
    cache, tokens = make_cache(model, None), prompt_tokens(tokenizer, PROMPT)
    read_prompt(model, tokens[:-1], cache)
    steps: list[tuple[int, ...]] = []
    plain = type(model).__call__

    def counted(self: nn.Module, inputs: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        steps.append(inputs.shape)
        return plain(self, inputs, *args, **kwargs)

    monkeypatch.setattr(type(model), "__call__", counted)
    assert len(continue_prompt(model, tokenizer, tokens, cache, 5).tokens) == 5
    assert steps == [(1, 1)] * 5


def test_the_prompt_is_read_without_computing_logits(
    loaded: tuple[nn.Module, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = loaded[0]
    rows: list[int] = []
    embeddings = type(model.model.embed_tokens)
    original = embeddings.as_linear

    def counted(self: Any, x: mx.array) -> mx.array:
        rows.append(x.shape[-2])
        return original(self, x)

    monkeypatch.setattr(embeddings, "as_linear", counted)
    generate(*loaded, PROMPT * 5, max_tokens=3)
    assert set(rows) == {1}


def test_a_prompt_of_one_token_is_continued(loaded: tuple[nn.Module, Any]) -> None:
    model, tokenizer = loaded
    result = generate(model, tokenizer, "a", max_tokens=3)
    assert (result.prompt_tokens, result.generation_tokens) == (1, 3)
    assert result.prompt_tokens_per_s is None


def test_the_result_says_what_it_took(loaded: tuple[nn.Module, Any]) -> None:
    result = generate(*loaded, PROMPT, max_tokens=5)
    values = result.to_dict()
    assert values["prompt_tokens"] == len(loaded[1].encode(PROMPT))
    assert values["generation_tokens"] == len(values["token_ids"]) == 5
    assert values["prompt_tokens_per_s"] > 0 and values["generation_tokens_per_s"] > 0
    assert values["backend"] in values["kernel_path"]
    assert values["peak_memory_bytes"] > 10**7


def test_the_cache_bytes_are_those_held(loaded: tuple[nn.Module, Any]) -> None:
    args: Any = loaded[0].args  # pyright: ignore[reportAttributeAccessIssue]
    result = generate(*loaded, PROMPT, max_tokens=5)
    number = 4 * 2 * args.num_hidden_layers * args.num_key_value_heads * WIDE_KEYS
    assert result.cache_bytes == 256 * number  # mlx-lm's cache grows by 256 tokens


def test_a_compressed_cache_holds_less_and_is_what_ran(loaded: tuple[nn.Module, Any]) -> None:
    prompt = PROMPT * 40
    plain = generate(*loaded, prompt, max_tokens=4)
    small = generate(*loaded, prompt, max_tokens=4, cache=CacheConfig(4, 4))
    assert small.cache_bytes < plain.cache_bytes / 5
    assert "packed_attention" in small.kernel_path
    assert "packed_attention" not in plain.kernel_path


def test_a_nearly_lossless_cache_gives_the_same_text(loaded: tuple[nn.Module, Any]) -> None:
    plain = generate(*loaded, PROMPT, max_tokens=8)
    assert generate(*loaded, PROMPT, max_tokens=8, cache=CacheConfig(8, 8)).token_ids == plain.token_ids


def test_generation_ends_where_the_context_does(loaded: tuple[nn.Module, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = loaded
    count = len(tokenizer.encode(PROMPT))
    monkeypatch.setattr(model.args, "max_position_embeddings", count + 3)
    result = generate(model, tokenizer, PROMPT, max_tokens=100)
    assert (result.generation_tokens, result.finish_reason) == (3, "length")


def test_a_prompt_longer_than_the_context_is_refused_with_both_lengths(loaded: tuple[nn.Module, Any]) -> None:
    with pytest.raises(InputError, match=r"has \d{4} tokens and the model reads at most 1024; shorten the prompt"):
        generate(*loaded, PROMPT * 400)


@pytest.mark.parametrize("max_tokens", [0, -1])
def test_asking_for_no_tokens_is_refused(loaded: tuple[nn.Module, Any], max_tokens: int) -> None:
    with pytest.raises(InputError, match=f"max_tokens is {max_tokens}; it must be at least 1"):
        generate(*loaded, PROMPT, max_tokens=max_tokens)


def test_a_model_of_unknown_build_is_read_whole() -> None:
    class Opaque(nn.Module):
        calls: list[tuple[int, ...]]

        def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
            self.calls.append(tokens.shape)
            return tokens

    model = Opaque()
    model.calls = []
    read_prompt(model, list(range(2 * CHUNK + 100)), [])
    assert model.calls == [(1, CHUNK), (1, CHUNK), (1, 100)]


def test_one_token_has_no_speed_and_two_have_that_of_one_step(loaded: tuple[nn.Module, Any]) -> None:
    assert generate(*loaded, PROMPT, max_tokens=1).generation_tokens_per_s is None
    cache, tokens = make_cache(loaded[0], None), prompt_tokens(loaded[1], PROMPT)
    read_prompt(loaded[0], tokens[:-1], cache)
    assert continue_prompt(*loaded, tokens, cache, 2).steps == 1


def test_rates_are_of_steps_and_seconds() -> None:
    assert Continuation("", [1, 2, 3], "length", 2, 1.0).tokens_per_s == 2.0
    assert Continuation("", [1], "length").tokens_per_s is None
    assert rate(5, 0.0) is None
