"""One to eight vectors times a quantized matrix: TurboQuant against `mx.quantized_matmul`, float and a plain read.

    python -m benchmarks.matvec [--shapes 4096x4096 14336x4096] [--rows 1 4 8] [--bits 2 3 4]

Shapes are outputs x inputs. On a GPU activations are float16 and the product of activations rotated already has a row
of its own; on a CPU, whose kernels rotate as they go, they are float32. `of_read` is the time over that of reading the
packed bytes as fast as MLX copies an array. `us_in_turn`, of one vector on a GPU: products that wait for each other, as
a model's do, there and back (outputs x inputs, then inputs x outputs), the mean of the two. An empty launch, of a
kernel that gets the arrays of a product and does nothing, is what MLX takes for any: no product can be faster.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

import metal_kernels
from benchmarks.harness import (
    Run,
    copies_of,
    copy_bandwidth,
    microseconds,
    microseconds_in_turn,
    on_gpu,
    path_of,
    report,
    save,
)
from metal_kernels.dispatch import record
from metal_kernels.gpu import products
from metal_kernels.gpu.hadamard import Activations
from metal_kernels.gpu.tiles import TileWeight
from metal_kernels.launch import SIMD
from quant_engine.codebook import lloyd_max
from quant_engine.rotation import choose_block, signs

GPU_SHAPES = ["4096x4096", "14336x4096", "8192x28672"]
CPU_SHAPES = ["4096x4096"]
GROUP = 64


def packed_weights(out: int, width: int, bits: int) -> list[metal_kernels.PackedWeight]:
    """Copies of a matrix of random codes, together several times the cache."""
    block, turn = choose_block(width, "auto"), mx.array(signs(width, 0))
    made: list[metal_kernels.PackedWeight] = []
    for i in range(copies_of(out * width * bits // 8)):
        packed = mx.random.randint(0, 0xFFFFFFFF, (out, width * bits // 32), dtype=mx.uint32, key=mx.random.key(i))
        scales = mx.full((out, width // GROUP), width**-0.5, dtype=mx.float16)
        made.append(metal_kernels.PackedWeight(packed, scales, lloyd_max(bits), turn, block))
    return made


def affine_weights(out: int, width: int, bits: int, dtype: mx.Dtype) -> list[tuple[mx.array, ...]]:
    """The same in MLX's affine form."""
    made: list[tuple[mx.array, ...]] = []
    for i in range(copies_of(out * width * bits // 8)):
        packed = mx.random.randint(0, 0xFFFFFFFF, (out, width * bits // 32), dtype=mx.uint32, key=mx.random.key(i))
        scales = mx.full((out, width // GROUP), width**-0.5, dtype=dtype)
        made.append((packed, scales, -2.0 * scales))
    mx.eval(made)
    return made


def float_weights(out: int, width: int, dtype: mx.Dtype) -> list[mx.array]:
    """Copies of a float matrix, a quarter as many as would be needed at 4 bits."""
    made = [mx.random.normal((out, width), dtype) for _ in range(min(16, copies_of(out * width * dtype.size)))]
    mx.eval(made)
    return made


def tile_weights(out: int, width: int, bits: int) -> list[TileWeight]:
    """`packed_weights` as a GPU's kernels take them."""
    return [weight.tiles for weight in packed_weights(out, width, bits) if weight.tiles is not None]


@dataclass(frozen=True)
class Method:
    """A way to multiply: weights of a shape (out, width), what their scales add to a value's bytes, the product of
    activations with one of them, and what is made of the activations before.
    """

    name: str
    bits: int | None
    weights: Callable[[int, int], list[Any]]
    scale_bytes: float
    product: Callable[[Any, Any], mx.array]
    prepare: Callable[[mx.array, Any], Any] = lambda x, _: x

    def run(self, x: mx.array, weights: list[Any]) -> Run:
        """Products that do not wait for each other."""
        ready = self.prepare(x, weights[0])
        return lambda i: self.product(ready, weights[i % len(weights)])

    def microseconds_in_turn(self, x: mx.array, there: list[Any], back: list[Any]) -> float:
        """Of products there and back, each with the result of the one before; of the two the mean."""

        def step(y: mx.array, i: int) -> mx.array:
            return self.product(self.product(y, there[i % len(there)]), back[i % len(back)])

        return microseconds_in_turn(step, x) / 2


def methods(bits: int, dtype: mx.Dtype) -> list[Method]:
    """Affine and TurboQuant, on a GPU with activations rotated before too."""
    made = [
        Method("affine", bits, lambda out, width: affine_weights(out, width, bits, dtype), 2 * dtype.size / GROUP,
               lambda x, w: mx.quantized_matmul(x, *w, group_size=GROUP, bits=bits)),
        Method("turboquant", bits, lambda out, width: packed_weights(out, width, bits), 2 / GROUP,
               metal_kernels.matmul),
    ]  # fmt: skip
    if on_gpu():
        made.append(Method("turboquant, rotated before", bits, lambda out, width: tile_weights(out, width, bits),
                           2 / GROUP, rotated_product, prepared))  # fmt: skip
    return made


def empty_launch(weights: list[TileWeight]) -> Method:
    """A kernel that does nothing with the arrays that a product has."""
    make: Any = mx.fast.metal_kernel if metal_kernels.device() == "metal" else mx.fast.cuda_kernel
    kernel = make(name="empty_launch", input_names=["x", "packed"], output_names=["out"], source="")

    def launch(x: Activations, weight: TileWeight) -> mx.array:
        return kernel(
            inputs=[x.halves, weight.words], output_shapes=[(x.n, weight.rows)], output_dtypes=[mx.float16],
            grid=(SIMD, 1, 1), threadgroup=(SIMD, 1, 1),
        )[0]  # fmt: skip

    return Method("empty launch", None, lambda out, width: weights, 0, launch, prepared)


def prepared(x: mx.array, weight: TileWeight) -> Activations:
    """Rotated activations in the order of the kernel that their number calls for."""
    ready = products.prepare(x, weight)
    mx.eval(ready.halves)
    return ready


def rotated_product(x: mx.array | Activations, weight: TileWeight) -> mx.array:
    """The product of activations that are rotated: as `prepared` gives them, or one vector of halves as it is."""
    gpu = "metal" if metal_kernels.device() == "metal" else "cuda"
    record(gpu, "matmul")
    ready = Activations(x, 1, scaled=False) if isinstance(x, mx.array) else x
    return products.times(ready, weight, gpu, mx.float16)


def measure(out: int, width: int, rows: list[int], bits: list[int], read: float) -> list[dict[str, Any]]:
    """Rows of one shape, for each number of vectors; read: bytes a second of a plain read."""
    dtype = mx.float16 if on_gpu() else mx.float32
    vectors = {n: mx.random.normal((n, width), dtype) for n in rows}
    mx.eval(vectors)
    of_float = Method("float", 8 * dtype.size, lambda out, width: float_weights(out, width, dtype), 0,
                      lambda x, w: x @ w.T)  # fmt: skip
    compared = [of_float, *(method for b in bits for method in methods(b, dtype))]
    weights = [method.weights(out, width) for method in compared]
    if on_gpu():
        compared.append(empty_launch(weights[-1]))
        weights.append(weights[-1])
    made: list[dict[str, Any]] = []
    for n, x in vectors.items():
        runs = [method.run(x, there) for method, there in zip(compared, weights, strict=True)]
        times = microseconds(runs)
        for method, there, run, us in zip(compared, weights, runs, times, strict=True):
            row: dict[str, Any] = {"shape": f"{out}x{width}", "rows": n, "bits": method.bits, "method": method.name}
            row |= {"us": us}
            if method.bits is not None:
                row["of_read"] = 1e-6 * us * read / (out * width * (method.bits / 8 + method.scale_bytes))
            if on_gpu() and n == 1 and method.bits is not None:
                row["us_in_turn"] = method.microseconds_in_turn(x, there, method.weights(width, out))
                mx.clear_cache()
            made.append(row | {"path": path_of(run) if "turboquant" in method.name else "mlx"})
        compare(made[-len(compared) :])
    return made


def compare(rows: list[dict[str, Any]]) -> None:
    """Give rows of one number of vectors, the first of float, their ratios to float and to affine of the same bits."""
    affine = {row["bits"]: row for row in rows if row["method"] == "affine"}
    for row in rows:
        if row["bits"] is None:
            continue
        base = affine.get(row["bits"])
        row["times_affine"] = base["us"] / row["us"] if base else None
        row["times_float"] = rows[0]["us"] / row["us"]
        if base and "us_in_turn" in row:
            row["times_affine_in_turn"] = base["us_in_turn"] / row["us_in_turn"]


def run(name: str, description: str | None, shapes: list[str], rows: list[int], bits: list[int]) -> None:
    """Measure and report what the command line asks for; shapes, rows and bits: the defaults."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=shapes)
    parser.add_argument("--rows", type=int, nargs="+", default=rows)
    parser.add_argument("--bits", type=int, nargs="+", default=bits)
    args = parser.parse_args()
    read = copy_bandwidth()
    lists = {"shapes": args.shapes, "rows": map(str, args.rows), "bits": map(str, args.bits)}
    options = " ".join(f"--{option} {' '.join(values)}" for option, values in lists.items())
    command, made = f"python -m benchmarks.{name} {options}", list[dict[str, Any]]()
    for shape in args.shapes:
        out, width = map(int, shape.split("x"))
        made += measure(out, width, args.rows, args.bits, read)
        save(name, command, made, copy_gb_per_s=read / 1e9)
    report(name, command, made, copy_gb_per_s=read / 1e9)


def main() -> None:
    shapes, rows = (GPU_SHAPES, [1, 4, 8]) if on_gpu() else (CPU_SHAPES, [1])
    run("matvec", __doc__, shapes, rows, [2, 3, 4])


if __name__ == "__main__":
    main()
