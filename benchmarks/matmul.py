"""Many rows of activations times a quantized matrix: TurboQuant against `mx.quantized_matmul` and float.

python -m benchmarks.matmul [--shapes 4096x4096 14336x4096] [--rows 64 512] [--bits 2 3 4]
"""

import argparse
from typing import Any

from benchmarks.harness import copy_bandwidth, on_gpu, report
from benchmarks.matvec import measure


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "14336x4096"] if on_gpu() else ["2048x2048"])
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4] if on_gpu() else [3])
    args = parser.parse_args()
    read = copy_bandwidth()
    made: list[dict[str, Any]] = []
    for shape in args.shapes:
        out, width = map(int, shape.split("x"))
        for rows in args.rows:
            some = measure(out, width, rows, args.bits, read)
            for row in some:
                row["times_float"] = some[0]["us"] / row["us"]
            made += some
    command = f"python -m benchmarks.matmul --shapes {' '.join(args.shapes)} --rows {' '.join(map(str, args.rows))}"
    report("matmul", command, made, copy_gb_per_s=read / 1e9)


if __name__ == "__main__":
    main()
