"""Linear layers over the weights of `metal_kernels`: TurboQuant, dense and affine, alone or sharing an input."""

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from metal_kernels import AffineWeight, DenseWeight, PackedWeight, Weight, matmul, split
from quant_engine import residual, rotation
from quant_engine.quantizer import QuantizedWeight


class FastLinear(nn.Module):
    """y = x W^T + b, with W (out, in) in any form that `metal_kernels.matmul` multiplies.

    x (..., in) in any float dtype; y (..., out) in x's dtype. The weight is held outside the module's parameters,
    since a backend may keep it in a layout of its own.
    """

    def __init__(self, weight: Weight, bias: mx.array | None = None) -> None:
        super().__init__()
        self._weight = weight
        if bias is not None:
            self.bias = bias
            self.freeze(keys=["bias"])

    @property
    def weight_nbytes(self) -> int:
        """Bytes of the weight in its file's form: codes, scales and what else decoding needs."""
        return self._weight.nbytes

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, width = self._weight.shape
        return rows, width

    def __call__(self, x: mx.array) -> mx.array:
        y = matmul(x, self._weight)
        return y + self.bias.astype(y.dtype) if "bias" in self else y


class DenseLinear(FastLinear):
    """A linear layer in full precision, multiplied by this project's kernels."""

    def __init__(self, weight: mx.array, bias: mx.array | None = None) -> None:
        super().__init__(DenseWeight(weight), bias)
        self._array = weight

    @property
    def array(self) -> mx.array:
        """The weight (out, in) as it came."""
        return self._array


class AffineLinear(FastLinear):
    """A linear layer quantized as MLX does it, group by group to scale * code + bias: what users have today."""

    @classmethod
    def from_dense(cls, weight: mx.array, bias: mx.array | None, bits: int, group_size: int) -> "AffineLinear":
        """Quantize weight (out, in) with `mx.quantize`; scales and biases take the weight's dtype, as mlx-lm's do."""
        packed, scales, biases = mx.quantize(weight, group_size=group_size, bits=bits)
        mx.eval(packed, scales, biases)
        return cls(AffineWeight(packed, scales, biases, bits, group_size), bias)


class TurboQuantLinear(FastLinear):
    """A linear layer with rotated, codebook-quantized weights (TurboQuant, arXiv 2504.19874, algorithm 1)."""

    def __init__(
        self, weight: PackedWeight, bias: mx.array | None = None, qjl: residual.Residual | None = None
    ) -> None:
        super().__init__(weight, bias)
        self._qjl = qjl

    @classmethod
    def from_quantized(cls, weight: QuantizedWeight, bias: mx.array | None = None) -> "TurboQuantLinear":
        """The layer of a weight as `quantizer.quantize_weight` returns it."""
        return cls(packed_weight([weight]), bias, weight.residual)

    @property
    def weight_nbytes(self) -> int:
        """Bytes of codes, scales and QJL's signs and norms."""
        return self._weight.nbytes + (self._qjl.nbytes if self._qjl is not None else 0)

    def __call__(self, x: mx.array) -> mx.array:
        y = super().__call__(x)
        return y if self._qjl is None else y + self._qjl.apply(x).astype(y.dtype)


def packed_weight(parts: Sequence[QuantizedWeight]) -> PackedWeight:
    """Stack weights that share input, width, rotation and codebook into one matrix, rows in order."""
    first = parts[0]
    signs = mx.array(rotation.signs(first.width, first.seed)) if first.block > 1 else None
    packed = mx.concatenate([p.packed for p in parts]) if len(parts) > 1 else first.packed
    scales = mx.concatenate([p.scales for p in parts]) if len(parts) > 1 else first.scales
    return PackedWeight(packed, scales, first.codebook, signs, first.block)


class SharedInput:
    """Several layers that read the same input, computed as one product when the first of them is called.

    The results wait for their layers, which must be called with the very same array; a layer called with another
    starts a new product.
    """

    def __init__(self, linear: FastLinear, rows: Sequence[int]) -> None:
        self._linear = linear
        self._ends = [sum(rows[: i + 1]) for i in range(len(rows) - 1)]
        self._input: mx.array | None = None
        self._waiting: dict[int, mx.array] = {}

    def take(self, x: mx.array, part: int) -> mx.array:
        """The output rows of layer `part` for input x."""
        if self._input is not x or part not in self._waiting:
            self._waiting = dict(enumerate(self._parts(self._linear(x))))
            self._input = x
        y = self._waiting.pop(part)
        if not self._waiting:
            self._input = None
        return y

    def _parts(self, y: mx.array) -> list[mx.array]:
        lazy = "bias" in self._linear  # the sum is not computed yet, and is best left to be
        return y.split(tuple(self._ends), axis=-1) if lazy else split(y, self._ends)


class Branch(nn.Module):
    """One layer of a `SharedInput`."""

    def __init__(self, take: Callable[[mx.array, int], mx.array], part: int) -> None:
        super().__init__()
        self._take, self._part = take, part

    def __call__(self, x: mx.array) -> mx.array:
        return self._take(x, self._part)


def branches(linear: FastLinear, rows: Sequence[int]) -> list[Branch]:
    """The layers, of the given output rows in order, that a stacked layer computes together."""
    shared = SharedInput(linear, rows)
    return [Branch(shared.take, part) for part in range(len(rows))]


class FastEmbedding(nn.Module):
    """Token embeddings (vocabulary, width), also used as the output projection where they are tied."""

    def __init__(self, weight: mx.array, dtype: mx.Dtype) -> None:
        super().__init__()
        self._weight, self._dtype = weight, dtype
        self._head = DenseWeight(weight)

    def __call__(self, tokens: mx.array) -> mx.array:
        return self._weight[tokens].astype(self._dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """Logits (..., vocabulary) of hidden states (..., width)."""
        return matmul(x, self._head)
