"""One to eight vectors times a quantized matrix: TurboQuant against `mx.quantized_matmul`, float and a plain read.

    python -m benchmarks.matvec [--shapes 4096x4096 14336x4096] [--rows 1 4 8] [--bits 2 3 4]

Shapes are outputs x inputs. On a GPU activations are float16 and the product of activations rotated already has a row
of its own, products wait for each other, as a model's do, there and back (outputs x inputs, then inputs x outputs), and
times are the mean of the two. On a CPU, whose kernels rotate as they go, activations are float32 and each product is
evaluated by itself. `of_read` is the time over that of reading the packed bytes as fast as MLX copies an array. An
empty launch, of a kernel that gets the arrays of a product and does nothing, is what MLX takes for any: no product can
be faster.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import mlx.core as mx

import metal_kernels
from benchmarks.harness import (
    Step,
    command_of,
    copies_of,
    copy_bandwidth,
    microseconds_in_turn,
    on_gpu,
    path_of,
    report,
    save,
)
from metal_kernels import reference
from metal_kernels.dispatch import record
from metal_kernels.gpu import products
from metal_kernels.gpu.hadamard import Activations
from metal_kernels.gpu.products import FEW_ROWS
from metal_kernels.gpu.tiles import TileWeight
from metal_kernels.launch import SIMD
from quant_engine.codebook import lloyd_max
from quant_engine.rotation import choose_block, signs

GPU_SHAPES = ["4096x4096", "14336x4096", "8192x28672"]
CPU_SHAPES = ["4096x4096"]
GROUP = 64
MOST_OFF = 0.01


def packed_weights(out: int, width: int, bits: int) -> list[metal_kernels.PackedWeight]:
    """Copies of a matrix of random codes, together several times the cache."""
    return random_weights(out, width, bits, copies_of(out * width * bits // 8))


def random_weights(out: int, width: int, bits: int, count: int) -> list[metal_kernels.PackedWeight]:
    """Matrices of random codes, whose products are as large as activations."""
    block, turn, codebook = choose_block(width, "auto"), mx.array(signs(width, 0)), lloyd_max(bits)
    scale = width**-0.5 / math.sqrt(sum(value**2 for value in codebook) / len(codebook))
    made: list[metal_kernels.PackedWeight] = []
    for i in range(count):
        packed = mx.random.randint(0, 0xFFFFFFFF, (out, width * bits // 32), dtype=mx.uint32, key=mx.random.key(i))
        scales = mx.full((out, width // GROUP), scale, dtype=mx.float16)
        made.append(metal_kernels.PackedWeight(packed, scales, codebook, turn, block))
    return made


def affine_weights(out: int, width: int, bits: int, dtype: mx.Dtype) -> list[tuple[mx.array, ...]]:
    """The same in MLX's affine form."""
    step = (12 / (4**bits - 1) / width) ** 0.5
    made: list[tuple[mx.array, ...]] = []
    for i in range(copies_of(out * width * bits // 8)):
        packed = mx.random.randint(0, 0xFFFFFFFF, (out, width * bits // 32), dtype=mx.uint32, key=mx.random.key(i))
        scales = mx.full((out, width // GROUP), step, dtype=dtype)
        made.append((packed, scales, (1 - 2**bits) / 2 * scales))
    mx.eval(made)
    return made


def float_weights(out: int, width: int, dtype: mx.Dtype) -> list[mx.array]:
    """Copies of a float matrix."""
    copies = min(16, copies_of(out * width * dtype.size))
    made = [width**-0.5 * mx.random.normal((out, width), dtype) for _ in range(copies)]
    mx.eval(made)
    return made


@dataclass(frozen=True)
class Method:
    """A way to multiply: weights of a shape (out, width), what their scales add to a value's bytes, the product of
    activations with one of them, and of how many rows at most.
    """

    name: str
    bits: int | None
    weights: Callable[[int, int], list[Any]]
    scale_bytes: float
    product: Callable[[mx.array, Any], mx.array]
    most_rows: int = sys.maxsize

    def step(self, weights: Sequence[list[Any]]) -> Step:
        """Products with one of each of these lists of weights, one after the other."""

        def products_of(x: mx.array, number: int) -> mx.array:
            for several in weights:
                x = self.product(x, several[number % len(several)])
            return x

        return products_of


def methods(bits: list[int], dtype: mx.Dtype) -> list[Method]:
    """Float first, then affine and TurboQuant, on a GPU with activations rotated before too, and nothing."""
    packed = {b: partial(packed_weights, bits=b) for b in bits}
    made = [Method("float", 8 * dtype.size, partial(float_weights, dtype=dtype), 0, lambda x, w: x @ w.T)]
    for b in bits:
        made += [
            Method("affine", b, partial(affine_weights, bits=b, dtype=dtype), 2 * dtype.size / GROUP,
                   lambda x, w, b=b: mx.quantized_matmul(x, *w, group_size=GROUP, bits=b)),
            Method("turboquant", b, packed[b], 2 / GROUP, metal_kernels.matmul),
        ]  # fmt: skip
        if on_gpu():
            made.append(Method("turboquant, rotated before", b, packed[b], 2 / GROUP, rotated_product, FEW_ROWS))
    if on_gpu():
        made.append(Method("empty launch", None, packed[bits[0]], 0, empty_launch()))
    return made


def empty_launch() -> Callable[[mx.array, metal_kernels.PackedWeight], mx.array]:
    """A kernel that does nothing with the arrays that a product has."""
    make: Any = mx.fast.metal_kernel if metal_kernels.device() == "metal" else mx.fast.cuda_kernel
    kernel = make(name="empty_launch", input_names=["x", "packed"], output_names=["out"], source="")

    def launch(x: mx.array, weight: metal_kernels.PackedWeight) -> mx.array:
        tiles = cast(TileWeight, weight.tiles)
        return kernel(
            inputs=[x, tiles.words], output_shapes=[(len(x), tiles.rows)], output_dtypes=[mx.float16],
            grid=(SIMD, 1, 1), threadgroup=(SIMD, 1, 1),
        )[0]  # fmt: skip

    return launch


def rotated_product(x: mx.array, weight: metal_kernels.PackedWeight) -> mx.array:
    """The product of activations, of halves, as if they were rotated and in the order of the kernel for few."""
    gpu = "metal" if metal_kernels.device() == "metal" else "cuda"
    record(gpu, "matmul")
    return products.times(Activations(x, 1, scaled=False), cast(TileWeight, weight.tiles), gpu, mx.float16)


def check(x: mx.array, weight: metal_kernels.PackedWeight) -> None:
    """A wrong product's time says nothing: stops where one is off by more than a hundredth of the largest value."""
    rotated = reference.rotate(x.astype(mx.float32), weight.signs, weight.block)
    right = reference.matmul(rotated, *weight.canonical(), weight.codebook)
    off = float(mx.abs(metal_kernels.matmul(x, weight) - right).max() / mx.abs(right).max())
    if not off <= MOST_OFF:
        raise SystemExit(f"the product of {len(x)} rows with a weight of shape {weight.shape} is off by {off:.2%}")


def measure(out: int, width: int, rows: list[int], bits: list[int], read: float) -> Iterator[list[dict[str, Any]]]:
    """Rows of one shape, of one number of vectors after the other; read: bytes a second of a plain read."""
    dtype = mx.float16 if on_gpu() else mx.float32
    sides = [(out, width), (width, out)] if on_gpu() else [(out, width)]
    compared = methods(bits, dtype)
    weights = {make: [make(*side) for side in sides] for make in {method.weights for method in compared}}
    for n in rows:
        x = mx.random.normal((n, width), dtype)
        mx.eval(x)
        steps = {method: method.step(weights[method.weights]) for method in compared if n <= method.most_rows}
        times = microseconds_in_turn(list(steps.values()), x)
        group: list[dict[str, Any]] = []
        for (method, step), both in zip(steps.items(), times, strict=True):
            us = both / len(sides)
            row: dict[str, Any] = {"shape": f"{out}x{width}", "rows": n, "bits": method.bits, "method": method.name}
            row |= {"us": us}
            if method.bits is not None:
                row["of_read"] = 1e-6 * us * read / (out * width * (method.bits / 8 + method.scale_bytes))
            if method.name == "turboquant":
                for several in weights[method.weights]:
                    check(mx.random.normal((n, several[0].shape[1]), dtype), several[0])
            group.append(row | {"path": path_of(step, x) if "turboquant" in method.name else "mlx"})
        compare(group)
        yield group


def compare(rows: list[dict[str, Any]]) -> None:
    """Give rows of one number of vectors, the first of float, their ratios to float and to affine of the same bits."""
    affine = {row["bits"]: row for row in rows if row["method"] == "affine"}
    for row in rows:
        if row["bits"] is None:
            continue
        base = affine.get(row["bits"])
        row["times_affine"] = base["us"] / row["us"] if base else None
        row["times_float"] = rows[0]["us"] / row["us"]


def run(name: str, description: str | None, shapes: list[str], rows: list[int], bits: list[int]) -> None:
    """Measure and report what the command line asks for; shapes, rows and bits: the defaults."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=shapes)
    parser.add_argument("--rows", type=int, nargs="+", default=rows)
    parser.add_argument("--bits", type=int, nargs="+", default=bits)
    args = parser.parse_args()
    read = copy_bandwidth()
    command, made = command_of(name, **vars(args)), list[dict[str, Any]]()
    for shape in args.shapes:
        out, width = map(int, shape.split("x"))
        for group in measure(out, width, args.rows, args.bits, read):
            made += group
            save(name, command, made, copy_gb_per_s=read / 1e9)
    report(name, command, made, copy_gb_per_s=read / 1e9)


def main() -> None:
    shapes, rows = (GPU_SHAPES, [1, 4, 8]) if on_gpu() else (CPU_SHAPES, [1])
    run("matvec", __doc__, shapes, rows, [2, 3, 4])


if __name__ == "__main__":
    main()
