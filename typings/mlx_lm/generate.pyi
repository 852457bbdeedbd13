from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

@dataclass
class GenerationResponse:
    text: str
    token: int
    logprobs: mx.array
    from_draft: bool
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    finish_reason: str | None = None

def stream_generate(
    model: Any, tokenizer: Any, prompt: str | mx.array | list[int], max_tokens: int = 256, **options: Any
) -> Iterator[GenerationResponse]: ...
def generate(model: Any, tokenizer: Any, prompt: str | list[int], verbose: bool = False, **options: Any) -> str: ...
def generate_step(prompt: mx.array, model: Any, **options: Any) -> Iterator[tuple[int, mx.array]]: ...
def __getattr__(name: str) -> Any: ...
