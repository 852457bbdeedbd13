from collections.abc import Callable
from typing import Any

import mlx.core as mx

def make_sampler(
    temp: float = 0.0,
    top_p: float = 0.0,
    min_p: float = 0.0,
    min_tokens_to_keep: int = 1,
    top_k: int = 0,
    **options: Any,
) -> Callable[[mx.array], mx.array]: ...
def make_logits_processors(
    logit_bias: dict[int, float] | None = None,
    repetition_penalty: float | None = None,
    repetition_context_size: int | None = 20,
    **options: Any,
) -> list[Callable[[mx.array, mx.array], mx.array]]: ...
def __getattr__(name: str) -> Any: ...
