"""Products of activations with the weights of a mixture's experts, in tiles."""

from collections.abc import Callable, Sequence
from functools import cache

import mlx.core as mx

from metal_kernels.gpu import hadamard, matmul, matvec, turned_product
from metal_kernels.gpu.products import Gpu
from metal_kernels.gpu.tiles import BYTE_TABLE, PAIR_TABLE, Arrays, Recipe, TileWeight, in_one
from metal_kernels.launch import Kernel

PAIRS = Kernel(
    name="turboquant_expert_pairs",
    sources=("matvec.metal",),
    inputs=("x", "packed", "chosen"),
    outputs=("out",),
    large_memory=BYTE_TABLE,
)

TURNED_PAIRS = Kernel(
    name="turboquant_turned_expert_pairs",
    sources=("turned_product.metal",),
    inputs=("x", "packed", "chosen"),
    outputs=("out",),
    large_memory=BYTE_TABLE,
)

SEGMENTS = Kernel(
    name="turboquant_expert_segments",
    sources=("matvec.metal", "experts.metal"),
    inputs=("x", "packed", "first_rows", "first_blocks"),
    outputs=("out",),
    large_memory=BYTE_TABLE,
)

MATMUL = Kernel(
    name="turboquant_expert_matmul",
    sources=("matmul.metal", "experts.metal"),
    inputs=("x", "packed", "first_rows", "first_blocks"),
    outputs=("out",),
    large_memory=PAIR_TABLE,
)

MATRIX_ROWS = 16
"""Rows for each expert, on average, from which matrix units are filled well enough."""


def stack(weights: Sequence[TileWeight]) -> TileWeight:
    """Experts' weights of one recipe and rotation as one."""
    first = weights[0]
    words = in_one([w.codes for w in weights], [w.scales for w in weights], first.fixed)
    return TileWeight(words, first.fixed, *first.recipe[:-1], len(weights))


def expert_product(x: mx.array, weight: TileWeight, indices: mx.array, in_order: bool, gpu: Gpu) -> mx.array:
    """x (..., rows, width), not rotated, times the experts that `indices` choose: (*indices.shape, rows, out).

    in_order: the flat indices ascend, and a weight can be decoded once for several rows.
    """
    if in_order:
        return _in_order(x, weight, indices, gpu)
    return _compiled(weight.recipe, gpu)(x, indices, weight.arrays)


@cache
def _compiled(recipe: Recipe, gpu: Gpu) -> Callable[..., mx.array]:
    def run(x: mx.array, indices: mx.array, arrays: Arrays) -> mx.array:
        return _pairs(x, TileWeight(*arrays, *recipe), indices, gpu)

    return mx.compile(run)


def _pairs(x: mx.array, weight: TileWeight, indices: mx.array, gpu: Gpu) -> mx.array:
    """Every row and its expert by itself."""
    times, shape = 1, (*indices.shape, x.shape[-2], weight.rows)
    if x.shape[:-1] == (*indices.shape[:-1], 1, 1):
        times, chosen = indices.shape[-1], indices.astype(mx.uint32)
    else:
        x, chosen = _all_rows(x, indices)
    if turned_product.fits(1, x.dtype, weight, gpu):
        return _turned_pairs(x, weight, chosen, times, shape, gpu)
    ready = hadamard.prepare(x.reshape(-1, weight.width), weight.fixed, weight.block)
    share = matvec.shares_of(weight, ready.parts, chosen.size)
    constants = matvec.constants(weight, ready, x.dtype, ready.parts, share) | matvec.shapes(weight, ready.n)
    constants |= {"EXPERTS": weight.experts, "TIMES": times}
    inputs, out = [ready.halves, weight.words, chosen], (shape, x.dtype)
    return PAIRS.launch(inputs, [out], (share.groups, chosen.size), share.threads, constants)[0]


def _turned_pairs(
    x: mx.array, weight: TileWeight, chosen: mx.array, times: int, shape: tuple[int, ...], gpu: Gpu
) -> mx.array:
    """Rows of x, each for `times` of the pairs, turned by the threadgroups that multiply them.

    Arrays keep their shapes, of which the kernel knows enough: MLX takes time for every change.
    """
    share = turned_product.shares_of(1, x.dtype, weight, gpu, chosen.size)
    constants = turned_product.constants(1, x.dtype, weight, gpu) | share.constants
    constants |= {"EXPERTS": weight.experts, "TIMES": times}
    inputs = [x, weight.words, chosen]
    out, groups = (shape, x.dtype), (share.groups, chosen.size)
    return TURNED_PAIRS.launch(inputs, [out], groups, share.threads, constants)[0]


def _in_order(x: mx.array, weight: TileWeight, indices: mx.array, gpu: Gpu) -> mx.array:
    """Rows of one expert at a time."""
    x, chosen = _all_rows(x, indices)
    ready = hadamard.prepare(x, weight.fixed, weight.block)
    many, shape = chosen.size >= MATRIX_ROWS * weight.experts, matmul.SHAPES[gpu]
    columns = shape.columns if many else matvec.COLUMNS
    blocks = min(-(-ready.n * ready.parts // columns) + weight.experts, ready.n)
    if many:
        kernel, constants = MATMUL, matmul.constants(weight, ready, shape, x.dtype)
        groups, threads = matmul.groups_of(weight, shape), shape.threads
    else:
        share = matvec.shares_of(weight, columns, blocks)
        kernel, constants = SEGMENTS, matvec.constants(weight, ready, x.dtype, columns, share)
        groups, threads = share.groups, share.threads
    counts = (chosen[None] == mx.arange(weight.experts, dtype=mx.uint32)[:, None]).sum(axis=1)
    first_rows, first_blocks = _starts(counts), _starts((counts * ready.parts + columns - 1) // columns)
    inputs, out = [ready.halves, weight.words, first_rows, first_blocks], ((chosen.size, weight.rows), x.dtype)
    y = kernel.launch(inputs, [out], (groups, blocks), threads, constants | {"EXPERTS": weight.experts})[0]
    return y.reshape(*indices.shape, -1, weight.rows)


def _all_rows(x: mx.array, indices: mx.array) -> tuple[mx.array, mx.array]:
    """x (n, width) and the expert (n,) of each of its rows, uint32."""
    rows, width = x.shape[-2:]
    chosen = indices if rows == 1 else mx.repeat(indices[..., None], rows, axis=-1)
    return mx.broadcast_to(x, (*indices.shape, rows, width)).reshape(-1, width), chosen.reshape(-1).astype(mx.uint32)


def _starts(counts: mx.array) -> mx.array:
    """Where each run of `counts` begins, and where the last ends, uint32."""
    return mx.concatenate([mx.zeros((1,), mx.uint32), mx.cumsum(counts).astype(mx.uint32)])
