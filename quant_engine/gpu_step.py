"""A decoder layer on a GPU for few positions: one compiled call before attention, one after it."""

from typing import Any

import mlx.core as mx

from metal_kernels import CompiledLayer, Mask, TileLayer, has_kernel, position
from quant_engine.mlx_lm_adapter import attention_of_new


class GpuStep:
    """A layer that takes the place of mlx-lm's own; for one position of a whole model see `ModelStep`."""

    def __init__(self, layer: TileLayer) -> None:
        self.layer, self._compiled = layer, CompiledLayer(layer)

    def takes(self, x: mx.array) -> bool:
        """Whether x (B, L, width) is what the kernels take, and they are the backend's."""
        return self._compiled.takes(x) and has_kernel("feed_forward") and has_kernel("decoder_layer")

    def __call__(self, x: mx.array, mask: Mask, cache: Any) -> mx.array:
        """The layer's output (B, L, width) for x; `cache` is one of mlx-lm's or None."""
        heads = self._compiled.before(x, position(0 if cache is None else int(cache.offset)))
        return self._compiled.after(x, attention_of_new(*heads, cache, self.layer.heads.scale, mask))
