"""Continuing a prompt: the prompt read without computing logits, then tokens one by one."""

import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import wired_limit
from mlx_lm.models.cache import make_prompt_cache

import metal_kernels
from quant_engine import mlx_lm_adapter as adapter
from quant_engine.config import CacheConfig
from quant_engine.errors import InputError
from quant_engine.kv_cache import TurboQuantKVCache, convert_cache_to_turboquant
from quant_engine.progress import Progress, Steps, silent
from quant_engine.prompt import check_context, prompt_tokens
from quant_engine.sampling import Sampling
from quant_engine.token_stream import TokenStream

OnText = Callable[[str], None]
OnTokens = Callable[[int], None]
"""Told how many more tokens were read or made, with text or without. An exception raised inside it stops the work."""

_PROMPT_STEP, _PROMPT_STEP_ON_CPU = 2048, 512
"""Prompt tokens a step: as mlx-lm takes them, so that rounding is the same; fewer on a CPU, where those take seconds in
which nothing is reported and nothing can be stopped."""

READING, WRITING = "reading the prompt", "writing"
"""What progress says."""


def unheard(count: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class GenerationResult:
    """Text and tokens that continue a prompt, without the end token, and what making them took.

    text is as mlx-lm decodes it, without a space at its start.
    prompt_tokens_per_s is of all prompt tokens but the last, generation_tokens_per_s of all new tokens but
    the first; None where there is none. peak_memory_bytes: of MLX's allocations during the call on a GPU, of
    the process since its start on a CPU. finish_reason: "stop" at an end token, "length" at max_tokens or
    the context's end. cache_bytes: what the key-value cache takes at the end, its room for more tokens included.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    generation_tokens: int
    prompt_tokens_per_s: float | None
    generation_tokens_per_s: float | None
    peak_memory_bytes: int
    finish_reason: str
    backend: str
    kernel_path: str
    cache_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


@dataclass
class Continuation:
    """Text and tokens that were made; steps and seconds as `TokenStream.pace` gives them."""

    text: str
    tokens: list[int]
    finish_reason: str
    steps: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_s(self) -> float | None:
        """Of the tokens after the first; None where there is none."""
        return rate(self.steps, self.seconds)


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float | None = None,
    seed: int | None = None,
    chat: bool | None = None,
    cache: CacheConfig | None = None,
    on_text: OnText | None = None,
    progress: Progress = silent,
) -> GenerationResult:
    """Continue a prompt by at most max_tokens, fewer where the model's context ends.

    Sampling controls as in `Sampling`; temperature 0 gives mlx-lm's own greedy tokens. chat as in
    `prompt_tokens`. `cache` compresses the key-value cache as it is filled. on_text gets each piece of text, progress
    counts tokens of the prompt as they are read and new ones as they are made; an exception from either ends the
    generation and comes through. Raises InputError for a prompt or option that cannot be used.
    """
    sampling = Sampling(temperature, top_p, top_k, min_p, repetition_penalty, seed)
    tokens = prompt_tokens(tokenizer, prompt, chat)
    max_tokens = check_room(model, tokens, max_tokens)
    metal_kernels.reset_paths()
    mx.reset_peak_memory()
    held = make_cache(model, cache)
    steps = Steps(progress, len(tokens) - 1 + max_tokens)
    steps.add(READING, 0)
    started = time.perf_counter()
    read_prompt(model, tokens[:-1], held, partial(steps.add, READING))
    read = time.perf_counter()
    wrote = partial(steps.add, WRITING)
    made = continue_prompt(model, tokenizer, tokens, held, max_tokens, sampling, on_text, wrote)
    return GenerationResult(
        text=made.text,
        token_ids=made.tokens,
        prompt_tokens=len(tokens),
        generation_tokens=len(made.tokens),
        prompt_tokens_per_s=rate(len(tokens) - 1, read - started),
        generation_tokens_per_s=made.tokens_per_s,
        peak_memory_bytes=peak_memory_bytes(),
        finish_reason=made.finish_reason,
        backend=metal_kernels.active_backend(),
        kernel_path=metal_kernels.kernel_path(),
        cache_bytes=cache_nbytes(held),
    )


def check_room(model: nn.Module, tokens: list[int], max_tokens: int) -> int:
    """max_tokens, or what the model's context leaves after the prompt; InputError where that is nothing."""
    if max_tokens < 1:
        raise InputError(f"max_tokens is {max_tokens}; it must be at least 1")
    room = check_context(model, len(tokens) + 1, "the prompt with one token to generate", "shorten the prompt")
    return max_tokens if room is None else min(max_tokens, room + 1)


def make_cache(model: nn.Module, config: CacheConfig | None) -> list[Any]:
    """An empty prompt cache: mlx-lm's, or the compressed one of a config."""
    cache = make_prompt_cache(model)
    return cache if config is None else convert_cache_to_turboquant(cache, **config.to_dict())


def read_prompt(model: nn.Module, tokens: list[int], cache: list[Any], on_tokens: OnTokens = unheard) -> None:
    """Fill a cache with tokens, without the output projection where the model lets it be left out."""
    forward = adapter.backbone(model) or model
    for layer in cache:
        if isinstance(layer, TurboQuantKVCache):
            layer.reserve(len(tokens))
    step = _PROMPT_STEP_ON_CPU if metal_kernels.device() == "cpu" else _PROMPT_STEP
    for start in range(0, len(tokens), step):
        piece = tokens[start : start + step]
        forward(mx.array(piece)[None], cache=cache)
        mx.eval([c.state for c in cache])
        on_tokens(len(piece))


def continue_prompt(
    model: nn.Module,
    tokenizer: Any,
    tokens: list[int],
    cache: list[Any],
    max_tokens: int,
    sampling: Sampling | None = None,
    on_text: OnText | None = None,
    on_tokens: OnTokens = unheard,
) -> Continuation:
    """Generate after `tokens`, all but the last of which the cache holds."""
    sampling = sampling or Sampling()
    sample, processors = sampling.sampler(len(tokenizer)), sampling.processors(tokens[:-1])
    stream = TokenStream(model, tokens[-1], cache, max_tokens, sample, processors)
    made, detokenizer = Continuation("", [], "length"), tokenizer.detokenizer

    def tell() -> None:
        piece = detokenizer.last_segment
        made.text += piece
        if on_text is not None and piece:
            on_text(piece)

    with wired_limit(model, [mx.default_stream(mx.default_device())]):
        for token in stream:
            on_tokens(1)
            if token in tokenizer.eos_token_ids:
                made.finish_reason = "stop"
                break
            made.tokens.append(token)
            detokenizer.add_token(token)
            tell()
        made.steps, made.seconds = stream.pace()
        detokenizer.finalize()
        tell()
    return made


def cache_nbytes(cache: list[Any]) -> int:
    """Bytes that a prompt cache holds."""
    return sum(c.nbytes for c in cache)


def rate(count: int, seconds: float) -> float | None:
    """Tokens a second; None where there were none."""
    return count / seconds if count > 0 and seconds > 0 else None


def peak_memory_bytes() -> int:
    """Of MLX's allocations on a GPU; of the process on a CPU, where kernels allocate outside MLX."""
    if metal_kernels.device() != "cpu":
        return mx.get_peak_memory()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return math.floor(peak) * (1 if sys.platform == "darwin" else 1024)
