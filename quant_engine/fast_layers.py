"""Layers that take the place of MLX's own where those spend more on each step than on its arithmetic."""

from typing import cast

import mlx.core as mx
import mlx.nn as nn

from metal_kernels import Weight, feed_forward, rms_norm
from quant_engine import mlx_lm_adapter as adapter
from quant_engine.linear import FastLinear, TurboQuantLinear
from quant_engine.shared_input import Branch


class FastRMSNorm(nn.Module):
    """`nn.RMSNorm` by this project's kernel; the same parameter."""

    def __init__(self, norm: nn.RMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = cast(mx.array, norm["weight"]), norm.eps

    def __call__(self, x: mx.array) -> mx.array:
        return rms_norm(x, self.weight, self.eps)


class FeedForward(nn.Module):
    """A gated feed-forward layer whose gate and up projections are stacked in one weight; without biases."""

    def __init__(self, gate_up: Weight, down: Weight) -> None:
        super().__init__()
        self._gate_up, self._down = gate_up, down

    @property
    def weights(self) -> tuple[Weight, Weight]:
        """Gate and up stacked, and down."""
        return self._gate_up, self._down

    def __call__(self, x: mx.array) -> mx.array:
        return feed_forward(x, self._gate_up, self._down)


def use_fast_norms(model: nn.Module) -> None:
    """Put `FastRMSNorm` in the place of every `nn.RMSNorm`."""
    norms = adapter.linear_modules(model, (nn.RMSNorm,))
    adapter.replace_modules(model, {path: FastRMSNorm(cast(nn.RMSNorm, norm)) for path, norm in norms.items()})


def fuse_feed_forward(model: nn.Module) -> None:
    """Put `FeedForward` in the place of gated feed-forward layers whose projections allow it."""
    fused: dict[str, nn.Module] = {}
    for path, module in adapter.feed_forwards(model).items():
        gate, down = cast(nn.Module, module["gate_proj"]), cast(nn.Module, module["down_proj"])
        stacked = gate.stacked if isinstance(gate, Branch) else None
        if isinstance(stacked, FastLinear) and _plain(stacked) and isinstance(down, FastLinear) and _plain(down):
            fused[path] = FeedForward(stacked.matrix, down.matrix)
    adapter.replace_modules(model, fused)


def _plain(layer: FastLinear) -> bool:
    """Whether a layer is nothing but the product with its weight."""
    return "bias" not in layer and not (isinstance(layer, TurboQuantLinear) and layer.corrected)
