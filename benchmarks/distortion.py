"""What codes lose on Gaussian and on real vectors: python -m benchmarks.distortion.

Vectors are scaled to length 1. `paper`: mean squared error with one root-mean-square scale a vector, as in
the paper; `group 64`: with a float16 scale of least squared error for 64 values. `inner product` and `with
QJL`: d times the mean squared error of inner products between pairs of vectors, for the code alone and for a
code of one bit less with QJL at the same size; `bound` is the paper's for the latter. The Gaussian needs no
file.
"""

from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.harness import SHARED, report
from quant_engine.codebook import distortion, lloyd_max
from quant_engine.config import QuantConfig
from quant_engine.quantizer import dequantize_weight, quantize_weight
from quant_engine.residual import project

BITS = (1, 2, 3, 4)
PAPER_BOUND = {1: 1.57, 2: 0.56, 3: 0.18, 4: 0.047}
"""d times the squared error of inner products of unit vectors (arXiv 2504.19874, theorem 2)."""

REAL = ("bge_m3_1000x1024", "word2vec_1000x300")


def unit_vectors(vectors: np.ndarray) -> mx.array:
    """Rows of length 1, float32, padded with zeros to whole words of codes."""
    padded = np.pad(vectors.astype(np.float32), ((0, 0), (0, -vectors.shape[1] % 64)))
    return mx.array(padded / np.linalg.norm(padded, axis=1, keepdims=True))


def sets() -> dict[str, mx.array]:
    """Vector sets by name: a Gaussian one, and the real ones that are there."""
    found = {"gaussian": unit_vectors(np.random.default_rng(0).standard_normal((1000, 1024)))}
    for name in REAL:
        path = SHARED / "data" / "vectors" / f"{name}.npy"
        if path.exists():
            found[name] = unit_vectors(np.load(path))
        else:
            print(f"skipped {name}: {path} is not there")
    return found


def loss(x: mx.array, restored: mx.array) -> float:
    """Mean squared distance of rows."""
    return float(mx.square(x - restored).sum(-1).mean())


def product_error(x: mx.array, restored: mx.array) -> tuple[float, float]:
    """d times the mean squared error of inner products of each row with 50 others, and their mean error."""
    error = mx.stack([((restored - x) * mx.roll(x, i, axis=0)).sum(-1) for i in range(1, 51)])
    return x.shape[1] * float(mx.square(error).mean()), float(error.mean())


def with_qjl(x: mx.array, bits: int, rotation: str) -> mx.array:
    """x as a code of one bit less and QJL restore it; at one bit QJL is all there is."""
    if bits == 1:
        return project(x, 0).dequantize()
    return dequantize_weight(
        quantize_weight(x, QuantConfig(rotation=rotation, group_size=0, scale="rms", use_qjl=True), bits - 1)
    )


def measure(name: str, x: mx.array, bits: int, rotation: str) -> dict[str, Any]:
    """One line of the table."""
    plain = QuantConfig(rotation=rotation, group_size=0, scale="rms")
    paper = dequantize_weight(quantize_weight(x, plain, bits))
    grouped = dequantize_weight(quantize_weight(x, QuantConfig(rotation=rotation), bits))
    alone, _ = product_error(x, paper)
    corrected, bias = product_error(x, with_qjl(x, bits, rotation))
    return {
        "vectors": name, "rotation": rotation, "bits": bits, "exact": distortion(lloyd_max(bits)),
        "paper": loss(x, paper), "group 64": loss(x, grouped), "inner product": alone, "with QJL": corrected,
        "bound": PAPER_BOUND[bits], "QJL bias": bias,
    }  # fmt: skip


def main() -> None:
    """Measure every set with and without rotation at 1 to 4 bits."""
    rows = [
        measure(name, x, bits, rotation) for name, x in sets().items() for rotation in ("auto", "none") for bits in BITS
    ]
    report("distortion", "python -m benchmarks.distortion", rows)


if __name__ == "__main__":
    main()
