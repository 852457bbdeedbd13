"""A decoder layer on a GPU for few positions: attention, and between two layers' attentions one compiled call."""

from typing import Any

import mlx.core as mx

from metal_kernels import CompiledLayer, Mask, TileLayer, has_kernel, position
from quant_engine.mlx_lm_adapter import attention_of_new

Heads = tuple[mx.array, mx.array, mx.array]


class GpuStep:
    """A layer that takes the place of mlx-lm's own, and, if it is followed, begins the next one as well.

    Then what the next layer's attention takes of this one's output is made in the same call and waits there; if that
    layer is called with another input or at another position, it makes its own.
    """

    def __init__(self, layer: TileLayer) -> None:
        self.layer, self._layer, self._scale = layer, CompiledLayer(layer), layer.heads.scale
        self._following: GpuStep | None = None
        self._waiting: tuple[mx.array, int, Heads] | None = None

    def follow_with(self, following: "GpuStep") -> None:
        """Let `following` be the layer that takes this one's output."""
        self._layer.follow_with(following._layer)
        self._following = following

    def takes(self, x: mx.array) -> bool:
        """Whether x (B, L, width) is what the kernels take, and they are the backend's."""
        return self._layer.takes(x) and has_kernel("feed_forward") and has_kernel("decoder_layer")

    def __call__(self, x: mx.array, mask: Mask, cache: Any) -> mx.array:
        """The layer's output (B, L, width) for x; `cache` is one of mlx-lm's or None."""
        offset = 0 if cache is None else int(cache.offset)
        waiting, self._waiting = self._waiting, None
        if waiting is not None and waiting[0] is x and waiting[1] == offset:
            heads = waiting[2]
        else:
            heads = self._layer.before(x, position(offset))
        attended = attention_of_new(*heads, cache, self._scale, mask)
        if self._following is None:
            return self._layer.after(x, attended)
        y, *heads = self._layer.through(x, attended, position(offset))
        self._following._waiting = y, offset, (heads[0], heads[1], heads[2])
        return y
