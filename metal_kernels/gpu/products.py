"""Products with weights in tiles: rotation and multiplication, by the kernel that suits the number of rows."""

from collections.abc import Callable
from functools import cache
from typing import Literal, get_args

import mlx.core as mx

from metal_kernels.gpu import hadamard, matmul, matvec, tiles
from metal_kernels.gpu.hadamard import Activations
from metal_kernels.gpu.tiles import Arrays, Recipe, TileWeight

FEW_ROWS = 16
"""Up to these the kernel that decodes a weight for every eight rows was faster on an H100. Metal has no other."""

Gpu = Literal["metal", "cuda"]
GPUS: tuple[Gpu, ...] = get_args(Gpu)


def fits(codebook: tuple[float, ...], block: int) -> bool:
    """Whether the kernels take weights of this codebook and Hadamard block."""
    return tiles.fits(codebook) and hadamard.fits(block)


def product(x: mx.array, weight: TileWeight, gpu: Gpu) -> mx.array:
    """x (..., width), not rotated, times the transposed weight: (..., rows) in x's dtype."""
    if x.size > FEW_ROWS * weight.width:
        return _multiply(x, weight, gpu)
    return _compiled(weight.recipe, gpu)(x, weight.arrays)


def gated_product(x: mx.array, gate_up: TileWeight, down: TileWeight, gpu: Gpu) -> mx.array:
    """A gated feed-forward layer, silu(x gate^T) * (x up^T) times the transposed `down`, in x's dtype."""
    if x.size > FEW_ROWS * gate_up.width:
        return _multiply(_multiply(x, gate_up, gpu), down, gpu, gated=True)
    return _compiled_gated(gate_up.recipe, down.recipe, gpu)(x, gate_up.arrays, down.arrays)


@cache
def _compiled(recipe: Recipe, gpu: Gpu) -> Callable[..., mx.array]:
    """One call instead of several; an array for each operation would cost more time than the operations."""

    def run(x: mx.array, arrays: Arrays) -> mx.array:
        return _multiply(x, TileWeight(*arrays, *recipe), gpu)

    return mx.compile(run)


@cache
def _compiled_gated(first: Recipe, second: Recipe, gpu: Gpu) -> Callable[..., mx.array]:
    def run(x: mx.array, gate_up: Arrays, down: Arrays) -> mx.array:
        both = _multiply(x, TileWeight(*gate_up, *first), gpu)
        return _multiply(both, TileWeight(*down, *second), gpu, gated=True)

    return mx.compile(run)


def _multiply(x: mx.array, weight: TileWeight, gpu: Gpu, gated: bool = False) -> mx.array:
    rows = x.reshape(-1, x.shape[-1])
    ready = hadamard.prepare(rows, weight.signs, weight.block, gated)
    return times(ready, weight, gpu, x.dtype).reshape(*x.shape[:-1], weight.rows)


def times(ready: Activations, weight: TileWeight, gpu: Gpu, dtype: mx.Dtype) -> mx.array:
    """Activations that `hadamard.prepare` made ready times the transposed weight: (n, rows) in `dtype`."""
    if gpu == "metal" or ready.n <= FEW_ROWS:
        return matvec.matvec(ready, weight, gpu, dtype)
    return matmul.matmul(ready, weight, dtype)
