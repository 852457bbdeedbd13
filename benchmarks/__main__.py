"""Run every benchmark, one after another: python -m benchmarks [NAME ...]."""

import runpy
import sys

NAMES = ("distortion", "matvec", "matmul", "experts", "attention", "end_to_end", "convert", "quality")


def main() -> None:
    chosen = sys.argv[1:] or list(NAMES)
    unknown = sorted(set(chosen) - set(NAMES))
    if unknown:
        sys.exit(f"no benchmark named {', '.join(unknown)}; choose from {', '.join(NAMES)}")
    for name in chosen:
        sys.argv = [name]
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")


if __name__ == "__main__":
    main()
