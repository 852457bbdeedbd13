"""What compressing the key-value cache costs: the same prompt with each cache, side by side."""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

import metal_kernels
from quant_engine.config import CacheConfig
from quant_engine.generate import (
    READING,
    WRITING,
    Continuation,
    cache_nbytes,
    check_room,
    continue_prompt,
    make_cache,
    read_prompt,
)
from quant_engine.progress import Progress, Steps, silent
from quant_engine.prompt import prompt_tokens
from quant_engine.score import logits_array, score

DEFAULT_CACHES = (CacheConfig(8, 8), CacheConfig(8, 4), CacheConfig(4, 4), CacheConfig(3, 3))
"""From safest to smallest."""

BASELINE = "float16"
"""What `compression` is relative to, whatever precision this machine computes in."""

_TAIL = 32
"""Tokens at the prompt's end whose predictions are compared too."""


@dataclass(frozen=True)
class CacheRow:
    """One cache's measurements.

    cache_bytes: what it holds after the prompt and the full-precision continuation. compression: bytes of a
    float16 cache of the same tokens, over cache_bytes. kl, top1: of next-token distributions over the prompt's
    last tokens and the full-precision continuation, mean KL(full || this) in nats, and the share of equal most
    likely tokens. text: this cache's own greedy continuation; tokens_per_s: its speed, None where it is one token.
    """

    cache: str
    k_bits: int | None
    v_bits: int | None
    cache_bytes: int
    compression: float
    tokens_per_s: float | None
    kl: float
    top1: float
    text: str
    backend: str
    kernel_path: str


@dataclass(frozen=True)
class CacheReport:
    """Rows of one prompt, full precision first; positions: distributions that kl and top1 are means of."""

    prompt_tokens: int
    positions: int
    rows: tuple[CacheRow, ...]
    baseline: str = BASELINE

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {**asdict(self), "rows": [asdict(row) for row in self.rows]}


@dataclass(frozen=True)
class _Run:
    """One cache's run: its continuation, its logits over the forced tokens, and what it held after them."""

    continuation: Continuation
    logits: NDArray[np.float32]
    cache: list[Any]
    kernel_path: str


def compare_caches(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    *,
    max_tokens: int = 64,
    caches: Sequence[CacheConfig] | None = None,
    chat: bool | None = None,
    progress: Progress = silent,
) -> CacheReport:
    """Continue a prompt greedily with a full-precision cache and with each of `caches` (None: DEFAULT_CACHES).

    Each compressed cache is filled compressed from the first token. progress counts the tokens that each cache reads
    and makes. Raises InputError for a prompt that cannot be used.
    """
    tokens = prompt_tokens(tokenizer, prompt, chat)
    max_tokens = check_room(model, tokens, max_tokens)
    configs = list(DEFAULT_CACHES if caches is None else caches)
    each = len(tokens) + max_tokens
    steps = Steps(progress, (1 + len(configs)) * each)
    full = _run(model, tokenizer, tokens, max_tokens, None, steps)
    rows = [_row(None, full, full)]
    for number, config in enumerate(configs, 1):
        steps.reach(number * each, rows[-1].cache)
        run = _run(model, tokenizer, tokens, max_tokens, config, steps, full.continuation)
        rows.append(_row(config, run, full))
    steps.reach(len(rows) * each, rows[-1].cache)
    return CacheReport(len(tokens), len(full.logits), tuple(rows))


def _run(
    model: nn.Module,
    tokenizer: Any,
    tokens: list[int],
    max_tokens: int,
    config: CacheConfig | None,
    steps: Steps,
    reference: Continuation | None = None,
) -> _Run:
    """Read the prompt but its tail once; from there continue freely, and score the reference's continuation."""
    metal_kernels.reset_paths()
    tail = tokens[-_TAIL:]
    read, wrote = (partial(steps.add, f"{_name(config)}: {what}") for what in (READING, WRITING))
    held = make_cache(model, config)
    read_prompt(model, tokens[: -len(tail)], held, read)
    forced_cache = copy.deepcopy(held)
    read_prompt(model, tail[:-1], held, read)
    made = continue_prompt(model, tokenizer, tokens, held, max_tokens, on_tokens=wrote)
    forced = [*tail, *(reference or made).tokens][:-1] or tail
    logits = cast(mx.array, model(mx.array(forced)[None], cache=forced_cache))[0]
    path = metal_kernels.kernel_path()
    return _Run(made, logits_array(logits), forced_cache, path)


def _row(config: CacheConfig | None, run: _Run, full: _Run) -> CacheRow:
    likely = full.logits.argmax(-1)
    compared = score(run.logits, likely, full.logits)
    held = cache_nbytes(run.cache)
    assert compared.kl is not None and compared.top1 is not None
    return CacheRow(
        cache=_name(config),
        k_bits=config.k_bits if config else None,
        v_bits=config.v_bits if config else None,
        cache_bytes=held,
        compression=_float16_nbytes(full.cache) / held,
        tokens_per_s=run.continuation.tokens_per_s,
        kl=compared.kl / compared.positions,
        top1=compared.top1 / compared.positions,
        text=run.continuation.text,
        backend=metal_kernels.active_backend(),
        kernel_path=run.kernel_path,
    )


def _name(config: CacheConfig | None) -> str:
    return "full precision" if config is None else config.title


def _float16_nbytes(cache: list[Any]) -> float:
    """What the floats of a full-precision cache would take in float16."""
    itemsize = max(array.dtype.size for layer in cache for array in layer.state if isinstance(array, mx.array))
    return cache_nbytes(cache) * 2 / itemsize
