"""Products of very many rows of activations with a weight in tiles, on the matrix units of NVIDIA's Hopper."""

from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from metal_kernels.gpu.hadamard import Activations
from metal_kernels.gpu.tiles import PAIR_TABLE, TileWeight
from metal_kernels.launch import SIMD, Kernel

MATMUL = Kernel(
    name="turboquant_warpgroup_matmul",
    sources=("warpgroup.metal",),
    inputs=("x", "packed"),
    outputs=("out",),
    large_memory=(70 << 10) + PAIR_TABLE,
)
FEW_ROWS = 64
"""Up to these the kernel of single simdgroups is as fast."""
WARPGROUP_TILES = 4


@dataclass(frozen=True)
class Shape:
    """A threadgroup's share: warpgroups, 64 rows of the weight each, and rows of activations, 64 or 128.

    planes: how many, 2 or 4, are decoded while as many are multiplied.
    """

    warpgroups: int
    columns: int
    planes: int


SHAPE = Shape(2, 128, 2)


@cache
def there() -> bool:
    """Whether MLX computes on a GPU of the Hopper kind, whose instructions are no other's."""
    if not mx.cuda.is_available() or mx.default_device() == mx.Device(mx.cpu):
        return False
    return str(mx.device_info().get("architecture", "")).startswith("sm_90")


def fits(n: int) -> bool:
    """Whether products of n rows of activations are best made here, from activations in pieces."""
    return n > FEW_ROWS and there()


def matmul(x: Activations, weight: TileWeight, dtype: mx.Dtype, shape: Shape = SHAPE) -> mx.array:
    """x (n, width), made ready in pieces by `prepare`, times the transposed weight: (n, rows) in `dtype`."""
    groups = (-(-weight.tiles // (WARPGROUP_TILES * shape.warpgroups)), -(-x.n * x.parts // shape.columns))
    inputs = [x.halves, weight.words]
    constants = {
        **weight.constants,
        **x.constants,
        "WARPGROUPS": shape.warpgroups,
        "COLUMNS": shape.columns,
        "COUNT": shape.planes,
        "T": dtype,
    }
    threads = WARPGROUP_TILES * SIMD * shape.warpgroups
    return MATMUL.launch(inputs, [((x.n, weight.rows), dtype)], groups, threads, constants)[0]
