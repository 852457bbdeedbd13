"""Between its ends the stream of a model is rotated; the ends themselves compute what they did."""

from typing import Any

import mlx.core as mx

from metal_kernels import rotate
from quant_engine import mlx_lm_adapter as adapter
from quant_engine import rotation
from quant_engine.stream_ends import RotatedEmbedding, UnrotatedNorm, rotate_between
from tests.quant_engine.checkpoints import CONFIG

TOKENS = mx.array([[3, 5, 8]])


def test_embeddings_are_rotated_logits_and_last_norm_are_not() -> None:
    model: Any = adapter.build(CONFIG | {"tie_word_embeddings": True})
    embedding, norm = model.model.embed_tokens, model.model.norm
    norm.weight = mx.random.normal((128,), key=mx.random.key(2))
    rotate_between(model, 128, seed=4)
    assert isinstance(model.model.embed_tokens, RotatedEmbedding) and isinstance(model.model.norm, UnrotatedNorm)
    rotated = rotate(embedding(TOKENS), mx.array(rotation.signs(128, 4)), 128)
    assert mx.array_equal(model.model.embed_tokens(TOKENS), rotated)
    assert mx.allclose(model.model.norm(rotated), norm(embedding(TOKENS)), atol=1e-5)
    x = mx.random.normal((1, 128))
    assert mx.array_equal(model.model.embed_tokens.as_linear(x), embedding.as_linear(x))
