"""How the next token is chosen from the model's distribution."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from quant_engine.errors import InputError

Sampler = Callable[[mx.array], mx.array]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]

COLDEST = 1e-30
"""Of temperatures: dividing by less can leave float32's range, and already this one leaves no choice."""

_PENALTY_TOKENS = 20
"""How far back a repetition is penalized, as mlx-lm does by default."""


@dataclass(frozen=True)
class Sampling:
    """temperature 0, or below COLDEST, takes the most likely token; above, top_p, top_k (0: all) and min_p narrow it.

    repetition_penalty above 1 makes the last 20 tokens less likely; None leaves them. seed makes a run
    repeatable by seeding MLX's global generator. Raises InputError for values outside these.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 (greedy) or above")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1 (all tokens)")
        _check("top_k", self.top_k, self.top_k >= 0, "0 (all tokens) or a number of tokens")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1")
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, penalty is None or 0 < penalty < math.inf, "above 0, 1 for none")
        _check("seed", self.seed, self.seed is None or 0 <= self.seed < 2**64, "from 0 to 2^64 - 1")

    def sampler(self, vocabulary: int) -> Sampler:
        """From logits (1, vocabulary) to a token (1,); seeds the generator with a seed given."""
        if self.seed is not None:
            mx.random.seed(self.seed)
        if self.temperature < COLDEST:
            return partial(mx.argmax, axis=-1)
        top_k = self.top_k if self.top_k < vocabulary else 0
        choose = make_sampler(temp=self.temperature, top_p=self.top_p, min_p=self.min_p, top_k=top_k)
        return lambda logits: choose((logits - mx.logsumexp(logits, axis=-1, keepdims=True)).astype(mx.float32))

    def processors(self, earlier: Sequence[int]) -> list[LogitsProcessor]:
        """What changes the logits first; `earlier` tokens are those that generation will not see itself."""
        if self.repetition_penalty is None or self.repetition_penalty == 1:
            return []
        head = mx.array(list(earlier[-_PENALTY_TOKENS:]), dtype=mx.int32)
        made = make_logits_processors(
            repetition_penalty=self.repetition_penalty, repetition_context_size=_PENALTY_TOKENS
        )
        return [_after(head, processor) for processor in made]


def _after(head: mx.array, processor: LogitsProcessor) -> LogitsProcessor:
    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        return processor(mx.concatenate([head, tokens.astype(mx.int32)]), logits)

    return process


def _check(name: str, value: object, allowed: bool, what: str) -> None:
    if not allowed:
        raise InputError(f"{name} is {value}; it must be {what}")
