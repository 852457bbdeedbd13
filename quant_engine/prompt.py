"""From a prompt's text to the tokens that a model reads, and whether they fit."""

import math
from typing import Any

import mlx.nn as nn

from quant_engine.errors import InputError


def prompt_tokens(tokenizer: Any, prompt: str, chat: bool | None = None) -> list[int]:
    """Tokens of a prompt: inside the tokenizer's chat template where it has one, as plain text otherwise.

    chat=True demands the template, chat=False leaves it out. Templates run in transformers' sandbox. Raises
    InputError for an empty prompt, a template that is missing or fails, and text that gives no tokens.
    """
    if not prompt.strip():
        raise InputError("the prompt is empty; give some text to continue")
    if chat is None:
        chat = bool(tokenizer.has_chat_template)
    tokens = _templated(tokenizer, prompt) if chat else _plain(tokenizer, prompt)
    if not tokens:
        raise InputError(f"the prompt {prompt[:40]!r} gives no tokens with this tokenizer; give other text")
    return tokens


def _templated(tokenizer: Any, prompt: str) -> list[int]:
    if not tokenizer.has_chat_template:
        raise InputError("the model has no chat template; leave chat off to have the prompt continued as plain text")
    try:
        message = [{"role": "user", "content": prompt}]
        return list(tokenizer.apply_chat_template(message, add_generation_prompt=True))
    except Exception as error:  # a template is a program of the model's author and can raise anything
        raise InputError(f"the model's chat template fails: {error}; turn chat off to go without it") from error


def _plain(tokenizer: Any, prompt: str) -> list[int]:
    """As mlx-lm does it: special tokens unless the prompt starts with one already."""
    start = tokenizer.bos_token
    return list(tokenizer.encode(prompt, add_special_tokens=start is None or not prompt.startswith(start)))


def context_length(model: nn.Module) -> int | None:
    """The most tokens that the model's config says it reads; None where it does not say.

    A factor by which the config stretches rotary positions counts.
    """
    args: Any = getattr(model, "args", None)
    length = getattr(args, "max_position_embeddings", None)
    if not isinstance(length, int) or length <= 0:
        return None
    scaling: Any = getattr(args, "rope_scaling", None) or {}
    factor = scaling.get("factor", 1.0)
    original = scaling.get("original_max_position_embeddings", length)
    return max(length, math.floor(original * factor)) if isinstance(factor, int | float) else length


def check_context(model: nn.Module, tokens: int, what: str, remedy: str) -> int | None:
    """Raise InputError for more tokens than the model reads; returns how many more it can, None: any."""
    limit = context_length(model)
    if limit is not None and tokens > limit:
        raise InputError(f"{what} has {tokens} tokens and the model reads at most {limit}; {remedy}")
    return None if limit is None else limit - tokens
