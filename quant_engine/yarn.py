"""YaRN's rotary frequencies (arXiv 2309.00071, section 3.2) without rounding the ends of its ramp."""

import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx


def frequencies(dims: int, rope: Mapping[str, Any], theta: float) -> mx.array:
    """Wavelengths over 2 pi of `dims` rotary dimensions, float32 (dims / 2,), as `mx.fast.rope` takes them.

    rope: a config's rope_parameters or rope_scaling: factor, original_max_position_embeddings, beta_fast, beta_slow.
    """
    length, factor = rope.get("original_max_position_embeddings", 4096), rope["factor"]

    def dimension(rotations: float) -> float:
        """Where the original context makes so many rotations."""
        return dims * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(dimension(rope.get("beta_fast", 32)), 0)
    high = min(dimension(rope.get("beta_slow", 1)), dims - 1)
    ramp = mx.clip((mx.arange(dims // 2) - low) / max(high - low, 1e-3), 0, 1)
    plain = theta ** (mx.arange(0, dims, 2) / dims)
    return 1 / ((1 - ramp) / plain + ramp / (factor * plain))
