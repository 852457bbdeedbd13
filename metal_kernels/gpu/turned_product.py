"""Products of few rows with a weight in tiles, in one launch: normed, turned, multiplied, then gated or added.

Every threadgroup turns all rows for itself, which takes less time than launching a kernel that does it once.
"""

from dataclasses import dataclass, replace

import mlx.core as mx

from metal_kernels.gpu import hadamard
from metal_kernels.gpu.architecture import memory_of
from metal_kernels.gpu.fixed import factors
from metal_kernels.gpu.matvec import COLUMNS, Shares, shapes, shares
from metal_kernels.gpu.tiles import BYTE_TABLE, TILE_ROWS, TileWeight
from metal_kernels.launch import SIMD, Dialect, Kernel, float_bits

TURNED_PRODUCT = Kernel(
    name="turboquant_turned_product",
    sources=("turned_product.metal",),
    inputs=("x", "norm", "packed", "added"),
    outputs=("out",),
    large_memory=BYTE_TABLE,
)
ONE = replace(TURNED_PRODUCT, name="turboquant_turned_product_one", inputs=("x", "more", "packed"))
"""With a norm or something to add, but not both, and one array less, for which MLX takes time."""
ALONE = replace(TURNED_PRODUCT, name="turboquant_turned_product_alone", inputs=("x", "packed"))
"""With neither."""

PLAIN, NORMED = 0, 2
MOST_WORK = {"cuda": 600_000, "metal": 150_000, "host": 150_000}
"""Additions of a row's rotation, from which on one launch that does them once is faster than doing them everywhere."""
AT_ONCE = (32, 16, 8, 4)
"""Values of a thread that change places with others' between two barriers: the first that memory is enough for."""
RESIDENT = 2112
"""Simdgroups that run at once: 16 for each of an H100's multiprocessors."""
PIECES = 8
"""Tiles' sums that a simdgroup has memory for, of all rows together, or two for each."""


@dataclass(frozen=True, eq=False)
class Norm:
    """An RMS norm's weight (width,) and the number that keeps its root from zero."""

    weight: mx.array
    eps: float

    def __call__(self, x: mx.array) -> mx.array:
        """x (..., width) normalised, by MLX."""
        return mx.fast.rms_norm(x, self.weight, self.eps)


def fits(n: int, dtype: mx.Dtype, weight: TileWeight, gpu: Dialect) -> bool:
    """Whether n rows of activations can be turned in threadgroup memory, and should be."""
    parts = _parts(dtype)
    if n * parts > COLUMNS or not hadamard.fits(weight.block):
        return False
    nbytes = _layout(weight, gpu).nbytes(_capacity(n) * parts, weight.padded, AT_ONCE[-1])
    return _work(weight) <= MOST_WORK[gpu] and nbytes <= memory_of(gpu)


def gates_fit(weight: TileWeight) -> bool:
    """Whether the rows of `weight` are two halves of whole tiles."""
    return weight.rows % (2 * TILE_ROWS) == 0


def turned_product(
    x: mx.array,
    weight: TileWeight,
    gpu: Dialect,
    *,
    norm: Norm | None = None,
    gates: bool = False,
    added: mx.array | None = None,
    first: int = 0,
) -> mx.array:
    """x (n, width), not rotated, times the transposed weight, plus `added` (n or 1, rows): (n, rows) in x's dtype.

    first: n, where x is any array that begins with as many rows: a slice would be one array more for MLX to make.
    norm: x is normalised first. gates, see `gates_fit`: silu(y[:, :rows / 2]) * y[:, rows / 2:], (n, rows / 2), is
    returned.
    """
    more = {"KIND": NORMED if norm else PLAIN, "EPS": float_bits(norm.eps if norm else 0.0), "PAIRED": gates}
    n = first or len(x)
    share = shares_of(n, x.dtype, weight, gpu, gates=gates)
    more |= {"ADDED": 0 if added is None else len(added)} | share.constants
    besides = [*([norm.weight] if norm else []), *([] if added is None else [added])]
    kernel = (ALONE, ONE, TURNED_PRODUCT)[len(besides)]
    inputs = [x, *besides[:1], weight.words, *besides[1:]]
    out = ((n, weight.rows // 2 if gates else weight.rows), x.dtype)
    settings = constants(n, x.dtype, weight, gpu) | more
    return kernel.launch(inputs, [out], (share.groups, 1), share.threads, settings)[0]


def constants(n: int, dtype: mx.Dtype, weight: TileWeight, gpu: Dialect) -> dict[str, int | bool | mx.Dtype]:
    """The compile-time values of turning n rows and of products with them."""
    layout, parts = _layout(weight, gpu), _parts(dtype)
    rows = _capacity(n) * parts
    at_once = next(count for count in AT_ONCE if layout.nbytes(rows, weight.padded, count) <= memory_of(gpu))
    return {
        "PARTS": parts, "COLUMNS": rows,
        "ODD": layout.odd, "POWER": layout.power, "AT_ONCE": min(at_once, layout.values), "TRANSFORM": weight.block > 1,
        "SCALED": dtype != mx.float16, "WIDTH": weight.width, "PADDED": weight.padded, "ROWS": _capacity(n), "T": dtype,
    } | weight.constants | shapes(weight, n)  # fmt: skip


def shares_of(
    n: int, dtype: mx.Dtype, weight: TileWeight, gpu: Dialect, at_once: int = 1, gates: bool = False
) -> Shares:
    """Of a weight's tiles, or pairs of them, where n rows, and `at_once` of such products, are taken at a time."""
    tiles, each = (weight.tiles // 2, 2) if gates else (weight.tiles, 1)
    simdgroups, rows = _layout(weight, gpu).simdgroups, _capacity(n) * _parts(dtype)
    groups = max(1, RESIDENT // simdgroups // at_once)
    return shares(tiles, weight.blocks, simdgroups, groups, max(2, PIECES // rows), each)


@dataclass(frozen=True)
class _Layout:
    """How a weight's rotation is shared out in a threadgroup."""

    odd: int
    power: int
    simdgroups: int

    @property
    def team(self) -> int:
        """Threads that turn one block."""
        return min(self.power, SIMD * self.simdgroups)

    @property
    def values(self) -> int:
        """Of a block, in a thread."""
        return self.odd * max(1, self.power // self.team)

    def nbytes(self, rows: int, padded: int, at_once: int) -> int:
        """Bytes of threadgroup memory for `rows` rows of halves; what a gap takes is at most an eighth."""
        turning = SIMD * self.simdgroups * min(at_once, self.values) * 9 // 8
        floats = max(turning, self.simdgroups * TILE_ROWS * max(PIECES, 2 * rows)) + COLUMNS + 4 * self.simdgroups + 8
        return 2 * rows * (padded + 32) + 4 * floats


def _layout(weight: TileWeight, gpu: Dialect) -> _Layout:
    odd, power = factors(weight.block)
    simdgroups = 16 if gpu == "cuda" else 8
    if weight.blocks < 8:
        simdgroups //= 2
    if weight.block == 1:
        power = min(weight.width & -weight.width, hadamard.MOST_THREADS)
    return _Layout(odd, power, simdgroups)


def _work(weight: TileWeight) -> int:
    """Additions of a row's rotation, about."""
    return weight.width * (8 + factors(weight.block)[0])


def _parts(dtype: mx.Dtype) -> int:
    return 2 if dtype == mx.float32 else 1


def _capacity(n: int) -> int:
    """Rows that a kernel is compiled for: as many as are asked for, rounded up to a power of two."""
    return 1 << (n - 1).bit_length()
