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
    rows = x.reshape(-1, x.shape[-1])
    if turned_product.fits(len(rows), x.dtype, weight, gpu):
        more = None if added is None else added.reshape(-1, weight.rows)
        y = turned_product.turned_product(rows, weight, gpu, norm=norm, added=more)
        return y.reshape(*x.shape[:-1], weight.rows)
    ready = prepare(norm(rows) if norm else rows, weight)
    return times(ready, weight, gpu, x.dtype, added).reshape(*x.shape[:-1], weight.rows)


def gated(
    x: mx.array,
    gate_up: TileWeight,
    down: TileWeight,
    gpu: Gpu,
    norm: Norm | None = None,
    added: mx.array | None = None,
) -> mx.array:
    """As `gated_product`, of x normalised, plus `added` (..., rows of down)."""
    rows = x.reshape(-1, x.shape[-1])
    if turned_product.fits(len(rows), x.dtype, gate_up, gpu) and turned_product.gates_fit(gate_up):
        inner = turned_product.turned_product(rows, gate_up, gpu, norm=norm, gates=True)
        return multiply(inner.reshape(*x.shape[:-1], down.width), down, gpu, added=added)
    both = multiply(rows, gate_up, gpu, norm)
    ready = prepare(both, down, gated=True)
    return times(ready, down, gpu, x.dtype, added).reshape(*x.shape[:-1], down.rows)


def prepare(x: mx.array, weight: TileWeight, gated: bool = False) -> Activations:
    """Activations made ready, see `hadamard.prepare`, for the kernel that `times` takes for as many."""
    return hadamard.prepare(x, weight.fixed, weight.block, gated, in_pieces=warpgroup.fits(len(x)))


def times(ready: Activations, weight: TileWeight, gpu: Gpu, dtype: mx.Dtype, added: mx.array | None = None) -> mx.array:
    """Activations that `hadamard.prepare` made ready times the transposed weight, plus `added`: (n, rows)."""
    more = None if added is None else added.reshape(-1, weight.rows)
    if ready.n <= FEW_ROWS:
        return matvec.matvec(ready, weight, dtype, more)
    y = warpgroup.matmul(ready, weight, dtype) if ready.in_pieces else matmul.matmul(ready, weight, gpu, dtype)
    return y if more is None else y + more
