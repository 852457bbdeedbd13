"""New tokens one after another, each computed while the one before is put to use."""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from quant_engine.sampling import LogitsProcessor, Sampler

_STEPS_BETWEEN_CLEARING = 256
"""After so many tokens MLX gives back memory that it holds for reuse, as mlx-lm has it."""


def token_stream(
    model: nn.Module,
    last: int,
    cache: list[Any],
    limit: int,
    sample: Sampler,
    processors: Sequence[LogitsProcessor] = (),
) -> Iterator[int]:
    """At most `limit` tokens after `last`, all before which the cache holds.

    What mlx-lm's `generate_step` does, without the logarithms of all probabilities at every token: on a CPU they take
    3 ms of a vocabulary of 152,000.
    """
    seen: mx.array = mx.array([last], dtype=mx.int32)

    def step(token: mx.array) -> mx.array:
        nonlocal seen
        logits = cast(mx.array, model(token[None], cache=cache))[:, -1, :]
        for process in processors:
            logits = process(seen, logits)
        chosen = sample(logits)
        if processors:
            seen = mx.concatenate([seen, chosen.astype(mx.int32)])
        mx.async_eval(chosen)
        return chosen

    following = step(seen)
    for made in range(1, limit + 1):
        token = following
        if made < limit:
            following = step(token)
        yield cast(int, token.item())
        if made % _STEPS_BETWEEN_CLEARING == 0:
            mx.clear_cache()
