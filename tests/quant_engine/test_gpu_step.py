"""Decoder layers on a GPU or an emulated one, one after another, against the same in plain MLX."""

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import KVCache

from metal_kernels import Heads, Norm, TileLayer, quantize, reference
from metal_kernels.gpu import tiles
from quant_engine.codebook import lloyd_max
from quant_engine.gpu_step import GpuStep
from quant_engine.rotation import signs
from tests.metal_kernels.host.machine import GPU, on_machine

WIDTH, HEADS, KV_HEADS, SIZE, INNER = 128, 4, 2, 32, 96
SHAPES = {
    "qkv": ((HEADS + 2 * KV_HEADS) * SIZE, WIDTH), "o": (WIDTH, HEADS * SIZE), "gate_up": (2 * INNER, WIDTH),
    "down": (WIDTH, INNER),
}  # fmt: skip
SCALE = SIZE**-0.5


@dataclass
class Layer:
    """One layer's weights in tiles, and as matrices of the original domain."""

    tiles: TileLayer
    matrices: dict[str, mx.array]
    norms: list[mx.array]

    @staticmethod
    def of(seed: int) -> "Layer":
        arranged: dict[str, tiles.TileWeight] = {}
        matrices: dict[str, mx.array] = {}
        for i, (name, (rows, width)) in enumerate(SHAPES.items()):
            turn, block = mx.array(signs(width, seed)), width & -width
            drawn = mx.random.normal((rows, width), key=mx.random.key(10 * seed + i)) / width**0.5
            codes = quantize(reference.rotate(drawn, turn, block), lloyd_max(4), 32)
            arranged[name] = tiles.arrange(*codes, lloyd_max(4), GPU, turn, block)
            matrices[name] = reference.unrotate(reference.dequantize(*codes, lloyd_max(4)), turn, block)
        norms = [1 + 0.1 * mx.random.normal((WIDTH,), key=mx.random.key(seed + i)) for i in (50, 51)]
        first, second = (Norm(norm.astype(mx.float16), 1e-5) for norm in norms)
        layer = TileLayer(
            first, second, arranged["qkv"], None, Heads(HEADS, KV_HEADS, SIZE, SCALE, None), nn.RoPE(SIZE),
            arranged["o"], None, arranged["gate_up"], arranged["down"], GPU,
        )  # fmt: skip
        return Layer(layer, matrices, norms)

    def plain(self, x: mx.array, cache: KVCache) -> mx.array:
        """The layer in float32."""
        offset, positions = cache.offset, x.shape[1]
        stacked = mx.fast.rms_norm(x, self.norms[0], 1e-5) @ self.matrices["qkv"].T
        heads = stacked.reshape(1, positions, -1, SIZE).transpose(0, 2, 1, 3)
        turned = mx.fast.rope(heads[:, : HEADS + KV_HEADS], SIZE, traditional=False, base=10000, scale=1, offset=offset)
        keys, values = cache.update_and_fetch(turned[:, HEADS:], heads[:, HEADS + KV_HEADS :])
        seen = mx.fast.scaled_dot_product_attention(turned[:, :HEADS], keys, values, scale=SCALE)
        x = x + seen.transpose(0, 2, 1, 3).reshape(1, positions, -1) @ self.matrices["o"].T
        gate, up = (mx.fast.rms_norm(x, self.norms[1], 1e-5) @ self.matrices["gate_up"].T).split(2, axis=-1)
        return x + (nn.silu(gate) * up) @ self.matrices["down"].T


@pytest.fixture(scope="module")
def layers() -> list[Layer]:
    return [Layer.of(1), Layer.of(2)]


def inputs() -> list[mx.array]:
    return [mx.random.normal((1, 1, WIDTH), key=mx.random.key(i)).astype(mx.float16) for i in range(3)]


def test_layers_in_steps_equal_the_plain_ones(tmp_path: Path, layers: list[Layer]) -> None:
    """Position after position, each with what the caches hold."""

    def run() -> list[mx.array]:
        steps, caches, made = [GpuStep(layer.tiles) for layer in layers], [KVCache(), KVCache()], list[mx.array]()
        for x in inputs():
            y = steps[0](x, None, caches[0])
            made.append(steps[1](y, None, caches[1]))
        return made

    caches = [KVCache(), KVCache()]
    for x, y in zip(inputs(), on_machine(tmp_path, run), strict=True):
        right = layers[1].plain(layers[0].plain(x.astype(mx.float32), caches[0]), caches[1])
        assert mx.abs(y - right).max() < 5e-3 * mx.abs(right).max()
