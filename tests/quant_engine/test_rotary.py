"""Tables of rotary embeddings are those of mlx-lm's modules, or there is none."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.rope_utils import Llama3RoPE, YarnRoPE

from quant_engine.rotary import Rotary

SIZE = 64
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "rope",
    [nn.RoPE(SIZE, base=10000.0), nn.RoPE(SIZE, scale=0.5), Llama3RoPE(SIZE, scaling_config=LLAMA3),
     YarnRoPE(SIZE, scaling_factor=4.0, original_max_position_embeddings=64)],
    ids=["plain", "scaled", "llama3", "yarn"],
)  # fmt: skip
def test_they_turn_as_the_module_does_at_any_position(rope: nn.Module) -> None:
    rotary = Rotary.of(rope, SIZE)
    assert rotary is not None
    x = np.random.default_rng(0).standard_normal((1, 1, 4, SIZE)).astype(np.float32)
    for offset in (0, 510, 3000):
        cos, sin = rotary.turns(offset, 4)
        first, second = np.split(x[0, 0], 2, axis=1)
        turned = np.concatenate([first * cos - second * sin, first * sin + second * cos], axis=1)
        assert np.allclose(turned, np.array(rope(mx.array(x), offset=offset))[0, 0], atol=2e-3)


@pytest.mark.parametrize("rope", [nn.RoPE(SIZE, traditional=True), nn.RoPE(SIZE // 2)], ids=["pairs", "half a head"])
def test_modules_that_turn_otherwise_have_none(rope: nn.Module) -> None:
    assert Rotary.of(rope, SIZE) is None
