"""Prompts: templates, special tokens, and lengths that do not fit."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.nn as nn
import pytest

from quant_engine import mlx_lm_adapter as adapter
from quant_engine.errors import InputError
from quant_engine.prompt import check_context, context_length, prompt_tokens

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<say>{% endif %}"
)


@pytest.fixture
def tokenizer(demo_model: Path) -> Any:
    return adapter.tokenizer(demo_model)


@pytest.fixture
def chatty(tokenizer: Any) -> Any:
    tokenizer.chat_template = TEMPLATE
    tokenizer.has_chat_template = True
    return tokenizer


def test_plain_text_is_encoded_as_it_is(tokenizer: Any) -> None:
    assert tokenizer.decode(prompt_tokens(tokenizer, "The city of")) == "The city of"


def test_a_template_is_used_where_there_is_one(chatty: Any) -> None:
    assert chatty.decode(prompt_tokens(chatty, "Hello")) == "<user>Hello<say>"
    assert chatty.decode(prompt_tokens(chatty, "Hello", chat=False)) == "Hello"


def test_a_template_cannot_reach_into_python(chatty: Any) -> None:
    chatty.chat_template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(InputError, match=r"template fails.*unsafe"):
        prompt_tokens(chatty, "Hello")


def test_a_broken_template_is_an_error_that_names_the_way_out(chatty: Any) -> None:
    chatty.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(InputError, match=r"no system role.*turn chat off"):
        prompt_tokens(chatty, "Hello", chat=True)


def test_a_template_that_was_asked_for_must_be_there(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="no chat template"):
        prompt_tokens(tokenizer, "Hello", chat=True)


@pytest.mark.parametrize("prompt", ["", " \n\t"])
def test_an_empty_prompt_is_refused(tokenizer: Any, prompt: str) -> None:
    with pytest.raises(InputError, match="prompt is empty"):
        prompt_tokens(tokenizer, prompt)


def test_a_prompt_without_tokens_is_refused() -> None:
    nothing = SimpleNamespace(has_chat_template=False, bos_token=None, encode=lambda *_, **__: [])
    with pytest.raises(InputError, match="gives no tokens"):
        prompt_tokens(nothing, "Hello")


def test_a_prompt_that_brings_its_own_start_gets_no_second_one(shared_models: Path) -> None:
    tokenizer = adapter.tokenizer(shared_models / "stories260k")
    once = prompt_tokens(tokenizer, "Once")
    assert prompt_tokens(tokenizer, "<s>Once").count(1) == once.count(1) == 1


def model_with(**args: Any) -> nn.Module:
    model = nn.Module()
    model.args = SimpleNamespace(**args)
    return model


@pytest.mark.parametrize(
    ("args", "length"),
    [
        ({"max_position_embeddings": 512}, 512),
        ({"max_position_embeddings": 512, "rope_scaling": {"type": "linear", "factor": 2.0}}, 1024),
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {"factor": 8.0, "original_max_position_embeddings": 8192},
            },
            131072,
        ),
        ({"max_position_embeddings": 512, "rope_scaling": {"type": "su", "factor": [1.0]}}, 512),
        ({}, None),
        ({"max_position_embeddings": 0}, None),
    ],
    ids=[
        "plain",
        "stretched",
        "stretched in the config already",
        "factors by frequency",
        "unsaid",
        "nonsense",
    ],
)
def test_the_context_is_what_the_config_says(args: dict[str, Any], length: int | None) -> None:
    assert context_length(model_with(**args)) == length


def test_a_model_without_args_says_nothing() -> None:
    assert context_length(nn.Module()) is None
    assert check_context(nn.Module(), 10**9, "it", "cut it") is None


def test_what_is_too_long_is_refused_with_both_numbers() -> None:
    model = model_with(max_position_embeddings=512)
    assert check_context(model, 500, "it", "cut it") == 12
    with pytest.raises(InputError, match="it has 513 tokens and the model reads at most 512; cut it"):
        check_context(model, 513, "it", "cut it")
