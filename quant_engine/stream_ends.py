"""The two ends of a rotated residual stream whose embeddings are tied to the head and so stay as they came."""

from collections.abc import Callable
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from metal_kernels import rotate, unrotate
from quant_engine import mlx_lm_adapter as adapter
from quant_engine import rotation
from quant_engine.folding import EMBEDDINGS, LAST_NORM


class RotatedEmbedding(nn.Module):
    """Token embeddings whose rows are rotated when they are looked up; the output projection reads them as they are."""

    def __init__(self, embedding: nn.Module, signs: mx.array, block: int) -> None:
        super().__init__()
        self.embedding = embedding
        self._signs, self._block = signs, block

    def __call__(self, tokens: mx.array) -> mx.array:
        return rotate(cast(Callable[..., mx.array], self.embedding)(tokens), self._signs, self._block)

    def as_linear(self, x: mx.array) -> mx.array:
        """Logits (..., vocabulary) of hidden states (..., width), not rotated."""
        return cast(nn.Embedding, self.embedding).as_linear(x)


class UnrotatedNorm(nn.Module):
    """A norm of a rotated stream that is turned back first."""

    def __init__(self, norm: nn.Module, signs: mx.array, block: int) -> None:
        super().__init__()
        self.norm = norm
        self._signs, self._block = signs, block

    def __call__(self, x: mx.array) -> mx.array:
        return cast(Callable[..., mx.array], self.norm)(unrotate(x, self._signs, self._block))


def rotate_between(model: nn.Module, block: int, seed: int) -> None:
    """Rotate the residual stream of a model between its embeddings and its last norm, which stay as they are."""
    modules = dict(cast(list[tuple[str, nn.Module]], model.named_modules()))
    norm = modules[LAST_NORM]
    signs = mx.array(rotation.signs(cast(mx.array, norm["weight"]).shape[0], seed))
    ends = {
        EMBEDDINGS: RotatedEmbedding(modules[EMBEDDINGS], signs, block),
        LAST_NORM: UnrotatedNorm(norm, signs, block),
    }
    adapter.replace_modules(model, ends)
