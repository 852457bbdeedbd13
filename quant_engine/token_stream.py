"""New tokens one after another, each computed while the one before is put to use."""

import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from quant_engine.sampling import LogitsProcessor, Sampler

_STEPS_BETWEEN_CLEARING = 256
"""After so many tokens MLX gives back memory that it holds for reuse, as mlx-lm has it."""


class TokenStream:
    """At most `limit` tokens after `last`, all before which the cache holds; iterate over it once.

    What mlx-lm's `generate_step` does, without the logarithms of all probabilities at every token: on a CPU they take
    3 ms of a vocabulary of 152,000. The first token is given before the second step is begun, so that it comes as
    early as it can and `pace` has a moment to count from.
    """

    def __init__(
        self,
        model: nn.Module,
        last: int,
        cache: list[Any],
        limit: int,
        sample: Sampler,
        processors: Sequence[LogitsProcessor] = (),
    ) -> None:
        self._model, self._cache, self._limit = model, cache, limit
        self._sample, self._processors = sample, processors
        self._seen: mx.array = mx.array([last], dtype=mx.int32)
        self._newest = self._seen
        self._steps, self._began = 0, 0.0

    def __iter__(self) -> Iterator[int]:
        self._step()
        yield cast(int, self._newest.item())
        self._began = time.perf_counter()
        if self._limit > 1:
            self._step()
        for made in range(2, self._limit + 1):
            token = self._newest
            if made < self._limit:
                self._step()
            yield cast(int, token.item())
            if made % _STEPS_BETWEEN_CLEARING == 0:
                mx.clear_cache()

    def pace(self) -> tuple[int, float]:
        """How many steps followed the first, and the seconds from the start of the second to the end of the last,
        which is waited for: whether a step runs at once or beside what follows it, all of it lies between."""
        if self._steps < 2:
            return 0, 0.0
        mx.eval(self._newest)
        return self._steps - 1, time.perf_counter() - self._began

    def _step(self) -> None:
        """Begin to compute the token after the newest."""
        logits = cast(mx.array, self._model(self._newest[None], cache=self._cache))[:, -1, :]
        for process in self._processors:
            logits = process(self._seen, logits)
        self._newest = self._sample(logits)
        if self._processors:
            self._seen = mx.concatenate([self._seen, self._newest.astype(mx.int32)])
        mx.async_eval(self._newest)
        self._steps += 1
