"""One to eight vectors times a quantized matrix: TurboQuant against `mx.quantized_matmul`, float and a plain read.

    python -m benchmarks.matvec [--shapes 4096x4096 14336x4096] [--rows 1 4 8] [--bits 2 3 4]

Shapes are outputs x inputs. On a GPU activations are float16 and the product of activations rotated already has a row
of its own; on a CPU, whose kernels rotate as they go, they are float32. `of_read` is the time over that of reading the
packed bytes as fast as MLX copies an array.
"""

import argparse
from typing import Any

import mlx.core as mx

import metal_kernels
from benchmarks.harness import copies_of, copy_bandwidth, microseconds, on_gpu, report
from metal_kernels.gpu import products
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


def measure(out: int, width: int, rows: int, bits: list[int], read: float) -> list[dict[str, Any]]:
    """Rows of one shape and number of vectors; read: bytes a second of a plain read."""
    dtype = mx.float16 if on_gpu() else mx.float32
    x = mx.random.normal((rows, width), dtype)
    mx.eval(x)
    floats = float_weights(out, width, dtype)
    full = microseconds(lambda i, floats=floats: x @ floats[i % len(floats)].T)
    del floats
    mx.clear_cache()
    of_read = 1e-6 * full * read / (out * width * dtype.size)
    made = [{"shape": f"{out}x{width}", "rows": rows, "bits": 8 * dtype.size, "method": "float", "us": full,
             "times_affine": None, "times_float": 1.0, "of_read": of_read,
             "path": "mlx"}]  # fmt: skip
    for b in bits:
        made += _quantized(x, out, b, read, full)
    return made


def _quantized(x: mx.array, out: int, bits: int, read: float, full: float) -> list[dict[str, Any]]:
    rows, width = x.shape
    theirs = affine_weights(out, width, bits, x.dtype)
    times = {"affine": microseconds(lambda i, theirs=theirs: mx.quantized_matmul(
        x, *theirs[i % len(theirs)], group_size=GROUP, bits=bits))}  # fmt: skip
    del theirs
    mx.clear_cache()
    ours = packed_weights(out, width, bits)
    metal_kernels.reset_paths()
    times["turboquant"] = microseconds(lambda i: metal_kernels.matmul(x, ours[i % len(ours)]))
    path = metal_kernels.kernel_path()
    tiles = [weight.tiles for weight in ours if weight.tiles is not None]
    if tiles:
        ready = products.prepare(x, tiles[0])
        mx.eval(ready.halves, ready.scales)
        gpu = "metal" if metal_kernels.device() == "metal" else "cuda"
        times["turboquant, rotated before"] = microseconds(
            lambda i: products.times(ready, tiles[i % len(tiles)], gpu, x.dtype)
        )
    nbytes = {"affine": out * width * bits / 8 + 4 * out * width / GROUP}
    return [
        {"shape": f"{out}x{width}", "rows": rows, "bits": bits, "method": method, "us": us,
         "times_affine": times["affine"] / us, "times_float": full / us,
         "of_read": 1e-6 * us * read / nbytes.get(method, ours[0].nbytes),
         "path": "mlx" if method == "affine" else path}
        for method, us in times.items()
    ]  # fmt: skip


def run(name: str, description: str | None, shapes: list[str], rows: list[int], bits: list[int]) -> None:
    """Measure and report what the command line asks for; shapes, rows and bits: the defaults."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=shapes)
    parser.add_argument("--rows", type=int, nargs="+", default=rows)
    parser.add_argument("--bits", type=int, nargs="+", default=bits)
    args = parser.parse_args()
    read = copy_bandwidth()
    made: list[dict[str, Any]] = []
    for shape in args.shapes:
        out, width = map(int, shape.split("x"))
        for n in args.rows:
            made += measure(out, width, n, args.bits, read)
    command = f"python -m benchmarks.{name} --shapes {' '.join(args.shapes)} --rows {' '.join(map(str, args.rows))}"
    report(name, command, made, copy_gb_per_s=read / 1e9)


def main() -> None:
    shapes, rows = (GPU_SHAPES, [1, 4, 8]) if on_gpu() else (CPU_SHAPES, [1])
    run("matvec", __doc__, shapes, rows, [2, 3, 4])


if __name__ == "__main__":
    main()
