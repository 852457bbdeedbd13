from typing import Any

import mlx.core as mx

def scaled_dot_product_attention(
    queries: mx.array,
    keys: Any,
    values: Any,
    cache: Any,
    scale: float,
    mask: Any,
    sinks: mx.array | None = None,
) -> mx.array: ...
def create_attention_mask(h: mx.array, cache: Any = None, *args: Any, **options: Any) -> Any: ...
def create_causal_mask(N: int, offset: int = 0, *args: Any, **options: Any) -> mx.array: ...
def __getattr__(name: str) -> Any: ...
