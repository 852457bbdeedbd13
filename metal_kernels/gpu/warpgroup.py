"""Products of many rows of activations with a weight in tiles, on the matrix units of NVIDIA's Hopper."""

import math
from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from metal_kernels.gpu.hadamard import Activations
from metal_kernels.gpu.matvec import MULTIPROCESSORS
from metal_kernels.gpu.tiles import TileWeight
from metal_kernels.launch import SIMD, Kernel

MATMUL = Kernel(
    name="turboquant_warpgroup_matmul",
    sources=("warpgroup.metal",),
    inputs=("x", "packed"),
    outputs=("out",),
    large_memory=70 << 10,
)
WARPGROUP_TILES = 4


@dataclass(frozen=True)
class Shape:
    """A threadgroup's share: warpgroups, 64 rows of the weight each, and rows of activations, 64 or 128.

    planes: how many, 2 or 4, are decoded while as many are multiplied.
    """

    warpgroups: int
    columns: int
    planes: int

    def groups(self, weight: TileWeight, columns: int) -> tuple[int, int]:
        """Threadgroups, by rows of the weight and by `columns` rows of halves."""
        return -(-weight.tiles // (WARPGROUP_TILES * self.warpgroups)), -(-columns // self.columns)


SHAPES = Shape(2, 128, 2), Shape(1, 128, 2), Shape(1, 64, 4)
"""From the least to copy and to decode to the most threadgroups."""


def there() -> bool:
    """Whether MLX computes on a GPU of the Hopper kind, whose instructions are no other's."""
    return mx.default_device() != mx.Device(mx.cpu) and _is_hopper()


@cache
def _is_hopper() -> bool:
    if not mx.cuda.is_available():
        return False
    return str(mx.device_info(mx.Device(mx.gpu)).get("architecture", "")).startswith("sm_90")


def shape_of(weight: TileWeight, columns: int) -> Shape:
    """The largest whose threadgroups leave no more than a quarter of all multiprocessors idle, and none twice as wide
    as there are rows of halves to multiply by."""
    for shape in SHAPES[:-1]:
        if columns > shape.columns // 2 and math.prod(shape.groups(weight, columns)) >= MULTIPROCESSORS * 3 // 4:
            return shape
    return SHAPES[-1]


def matmul(x: Activations, weight: TileWeight, dtype: mx.Dtype, shape: Shape | None = None) -> mx.array:
    """x (n, width), made ready in pieces by `prepare`, times the transposed weight: (n, rows) in `dtype`."""
    shape = shape or shape_of(weight, x.n * x.parts)
    groups = shape.groups(weight, x.n * x.parts)
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
