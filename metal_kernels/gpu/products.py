"""Products with weights in tiles: rotation and multiplication, by the kernel that suits the number of rows."""

from collections.abc import Callable
from functools import cache
from typing import Literal, get_args

import mlx.core as mx

from metal_kernels.gpu import hadamard, matmul, matvec, tiles, turned_product, warpgroup
from metal_kernels.gpu.hadamard import Activations
from metal_kernels.gpu.tiles import Arrays, Recipe, TileWeight
from metal_kernels.gpu.turned_product import Norm

FEW_ROWS = 16
"""Up to these the kernel that decodes a weight for every eight rows was faster on an H100."""
MOST_COUNTS = 4
"""Up to so many positions there is a kernel of every number of them; more are padded to 8 or 16."""

Gpu = Literal["metal", "cuda"]
GPUS: tuple[Gpu, ...] = get_args(Gpu)


def fits(codebook: tuple[float, ...], block: int) -> bool:
    """Whether the kernels take weights of this codebook and Hadamard block."""
    return tiles.fits(codebook) and hadamard.fits(block)


def product(x: mx.array, weight: TileWeight, gpu: Gpu) -> mx.array:
    """x (..., width), not rotated, times the transposed weight: (..., rows) in x's dtype."""
    if x.size > FEW_ROWS * weight.width:
        return multiply(x, weight, gpu)
    return _compiled(weight.recipe, gpu)(x, weight.arrays)


def gated_product(x: mx.array, gate_up: TileWeight, down: TileWeight, gpu: Gpu) -> mx.array:
    """A gated feed-forward layer, silu(x gate^T) * (x up^T) times the transposed `down`, in x's dtype."""
    if x.size > FEW_ROWS * gate_up.width:
        return gated(x, gate_up, down, gpu)
    return _compiled_gated(gate_up.recipe, down.recipe, gpu)(x, gate_up.arrays, down.arrays)


@cache
def _compiled(recipe: Recipe, gpu: Gpu) -> Callable[..., mx.array]:
    """One call instead of several; an array for each operation would cost more time than the operations."""

    def run(x: mx.array, arrays: Arrays) -> mx.array:
        return multiply(x, TileWeight(*arrays, *recipe), gpu)

    return mx.compile(run)


@cache
def _compiled_gated(first: Recipe, second: Recipe, gpu: Gpu) -> Callable[..., mx.array]:
    def run(x: mx.array, gate_up: Arrays, down: Arrays) -> mx.array:
        return gated(x, TileWeight(*gate_up, *first), TileWeight(*down, *second), gpu)

    return mx.compile(run)


def multiply(
    x: mx.array, weight: TileWeight, gpu: Gpu, norm: Norm | None = None, added: mx.array | None = None
) -> mx.array:
    """As `product`, of x normalised, plus `added` (..., rows); in one launch where the rows are few."""
    rows, more = _in_rows(x, added, weight, weight.rows)
    return _like(x, _multiply(rows, weight, gpu, norm, more))


def gated(
    x: mx.array,
    gate_up: TileWeight,
    down: TileWeight,
    gpu: Gpu,
    norm: Norm | None = None,
    added: mx.array | None = None,
) -> mx.array:
    """As `gated_product`, of x normalised, plus `added` (..., rows of down)."""
    rows, more = _in_rows(x, added, gate_up, down.rows)
    if turned_product.fits(len(rows), x.dtype, gate_up, gpu) and turned_product.gates_fit(gate_up):
        inner = turned_product.turned_product(rows, gate_up, gpu, norm=norm, gates=True)
        return _like(x, _multiply(inner, down, gpu, None, more))
    ready = prepare(_multiply(rows, gate_up, gpu, norm, None), down, gated=True)
    return _like(x, times(ready, down, gpu, x.dtype, more))


def _multiply(rows: mx.array, weight: TileWeight, gpu: Gpu, norm: Norm | None, added: mx.array | None) -> mx.array:
    if turned_product.fits(len(rows), rows.dtype, weight, gpu):
        return turned_product.turned_product(rows, weight, gpu, norm=norm, added=added)
    return times(prepare(norm(rows) if norm else rows, weight), weight, gpu, rows.dtype, added)


def _in_rows(x: mx.array, added: mx.array | None, weight: TileWeight, out: int) -> tuple[mx.array, mx.array | None]:
    """x (n, width) and what is added (n or 1, out); those of a few positions of a sequence with others after them.

    A kernel is compiled for a number of rows, and short prompts have every number; of a batch's only one is seen.
    """
    rows, more = x.reshape(-1, weight.width), None if added is None else added.reshape(-1, out)
    n, positions = len(rows), x.shape[-2] if x.ndim > 2 else 1
    spare = (1 << (n - 1).bit_length()) - n if positions > 1 and MOST_COUNTS < n < FEW_ROWS else 0
    if spare == 0:
        return rows, more
    after = [(0, spare), (0, 0)]
    return mx.pad(rows, after), more if more is None or len(more) == 1 else mx.pad(more, after)


def _like(x: mx.array, y: mx.array) -> mx.array:
    """Of the rows y those that stand for x's, in its shape."""
    n = x.size // x.shape[-1]
    return (y if len(y) == n else y[:n]).reshape(*x.shape[:-1], y.shape[-1])


def prepare(x: mx.array, weight: TileWeight, gated: bool = False) -> Activations:
    """Activations made ready, see `hadamard.prepare`, for the kernel that `times` takes for as many."""
    in_pieces = weight.nvidia and len(x) > FEW_ROWS and warpgroup.there()
    return hadamard.prepare(x, weight.fixed, weight.block, gated, in_pieces)


def times(ready: Activations, weight: TileWeight, gpu: Gpu, dtype: mx.Dtype, added: mx.array | None = None) -> mx.array:
    """Activations that `hadamard.prepare` made ready times the transposed weight: (n, rows).

    added: (n or 1, rows) to add.
    """
    if ready.n <= FEW_ROWS:
        return matvec.matvec(ready, weight, dtype, added)
    y = warpgroup.matmul(ready, weight, dtype) if ready.in_pieces else matmul.matmul(ready, weight, gpu, dtype)
    return y if added is None else y + added
