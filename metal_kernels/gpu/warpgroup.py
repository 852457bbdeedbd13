"""Products of many rows of activations with a weight in tiles, on the matrix units of NVIDIA's Hopper."""

import math
from dataclasses import dataclass, replace
from functools import cache

import mlx.core as mx

from metal_kernels.errors import KernelError
from metal_kernels.gpu.architecture import is_hopper
from metal_kernels.gpu.hadamard import Activations
from metal_kernels.gpu.matvec import MULTIPROCESSORS
from metal_kernels.gpu.tiles import TABLE, TileWeight
from metal_kernels.launch import SIMD, Kernel

MATMUL = Kernel(
    name="turboquant_warpgroup_matmul",
    sources=("hopper_{dialect}.h", "warpgroup.metal"),
    inputs=("x", "packed"),
    outputs=("out",),
)
WARPGROUP_TILES = 4
WARPGROUP = WARPGROUP_TILES * SIMD
FEW, MANY = MULTIPROCESSORS * 3 // 4, MULTIPROCESSORS * 4
"""Threadgroups that leave no more than a quarter of all multiprocessors idle; warpgroups that keep them all busy."""
MOST_TEAMS = 4
MEMORY = 227 << 10
"""Bytes of threadgroup memory that Hopper has."""


@dataclass(frozen=True)
class Shape:
    """A threadgroup's share, and how it is divided.

    Teams, no more than blocks, share the blocks of 64 rows of the weight for each of `warpgroups`, and multiply them by
    `columns` rows of halves: 64, 128 or 256.
    """

    warpgroups: int
    columns: int
    teams: int = 1

    @property
    def threads(self) -> int:
        """Of a threadgroup."""
        return WARPGROUP * self.warpgroups * self.teams

    @property
    def memory(self) -> int:
        """Bytes for four units of each team's activations, or for sums that teams send and results after them."""
        sent = (self.teams - 1) * self.warpgroups * 64 * self.columns * 4
        results = self.columns * (64 * self.warpgroups * 2 + 16)
        return max(self.teams * 4 * 128 * self.columns, sent + results)

    def groups(self, weight: TileWeight, columns: int) -> tuple[int, int]:
        """Threadgroups, by rows of the weight and by `columns` rows of halves."""
        return -(-weight.tiles // (WARPGROUP_TILES * self.warpgroups)), -(-columns // self.columns)


SHAPES = Shape(2, 256), Shape(1, 256), Shape(1, 128), Shape(1, 64)
"""From the least to copy and to decode to the most threadgroups."""


def there() -> bool:
    """Whether MLX computes on a GPU of the Hopper kind, whose instructions are no other's."""
    return mx.default_device() != mx.Device(mx.cpu) and is_hopper()


def shape_of(weight: TileWeight, columns: int) -> Shape:
    """The largest that makes enough threadgroups, and none twice as wide as there are rows of halves to multiply by; in
    as many teams as keep multiprocessors busy."""
    fitting = (
        shape
        for shape in SHAPES[:-1]
        if columns > shape.columns // 2 and math.prod(shape.groups(weight, columns)) >= FEW
    )
    shape = next(fitting, SHAPES[-1])
    room = min(MOST_TEAMS, MEMORY // shape.memory, weight.blocks)
    wanted = MANY // (shape.warpgroups * math.prod(shape.groups(weight, columns)))
    return replace(shape, teams=max(1, min(room, wanted)))


def matmul(x: Activations, weight: TileWeight, dtype: mx.Dtype, shape: Shape | None = None) -> mx.array:
    """x (n, width), made ready in pieces by `prepare`, times the transposed weight: (n, rows) in `dtype`.

    Raises KernelError for a shape of more teams than the weight has blocks of columns.
    """
    shape = shape or shape_of(weight, x.n * x.parts)
    if shape.teams > weight.blocks:
        raise KernelError(f"{shape.teams} teams for {weight.blocks} blocks; each must have one")
    groups = shape.groups(weight, x.n * x.parts)
    inputs = [x.halves, weight.words]
    constants = {
        **{name: value for name, value in weight.constants.items() if name not in TABLE},
        **x.constants,
        "WARPGROUPS": shape.warpgroups,
        "COLUMNS": shape.columns,
        "TEAMS": shape.teams,
        "MEMORY": shape.memory,
        "T": dtype,
    }
    return _kernel(shape.memory).launch(inputs, [((x.n, weight.rows), dtype)], groups, shape.threads, constants)[0]


@cache
def _kernel(memory: int) -> Kernel:
    return replace(MATMUL, large_memory=memory)
