"""Many rows of activations times a quantized matrix: TurboQuant against `mx.quantized_matmul` and float.

python -m benchmarks.matmul [--shapes 4096x4096 14336x4096] [--rows 64 512] [--bits 2 3 4]
"""

from benchmarks.harness import on_gpu
from benchmarks.matvec import run


def main() -> None:
    shapes, bits = (["4096x4096", "14336x4096"], [2, 3, 4]) if on_gpu() else (["2048x2048"], [3])
    run("matmul", __doc__, shapes, [64, 512], bits)


if __name__ == "__main__":
    main()
