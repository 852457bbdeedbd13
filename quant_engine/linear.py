"""Linear layers over the weights of `metal_kernels`: TurboQuant, dense and affine."""

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from metal_kernels import AffineWeight, DenseWeight, PackedWeight, Weight, embed, matmul
from quant_engine import rotation
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
    def matrix(self) -> Weight:
        """The weight, as `metal_kernels.matmul` takes it."""
        return self._weight

    @property
    def weight(self) -> mx.array:
        """The weight (out, in) decoded anew, for models that read it, in float32 or the precision of its file."""
        if isinstance(self._weight, AffineWeight):
            return self._weight.values(mx.float32)
        return embed(mx.arange(self.shape[0]), self._weight)

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
        self._whole = weight

    @property
    def weight(self) -> mx.array:
        """The weight (out, in) as it came."""
        return self._whole


class AffineLinear(FastLinear):
    """A linear layer quantized as MLX does it, group by group to scale * code + bias: what users have today."""

    @classmethod
    def from_dense(cls, weight: mx.array, bias: mx.array | None, bits: int, group_size: int) -> "AffineLinear":
        """Quantize weight (out, in) with `mx.quantize`; scales and biases take the weight's dtype, as mlx-lm's do."""
        packed, scales, biases = mx.quantize(weight, group_size=group_size, bits=bits)
        mx.eval(packed, scales, biases)
        return cls(AffineWeight(packed, scales, biases, bits, group_size), bias)


class Correction(Protocol):
    """What QJL adds to a product, estimated from signs and norms of the rounding errors."""

    @property
    def nbytes(self) -> int:
        """Bytes of signs and norms."""
        ...

    def apply(self, x: mx.array) -> mx.array:
        """For inputs x (..., in), not rotated: (..., out) in x's dtype."""
        ...


class TurboQuantLinear(FastLinear):
    """A linear layer with rotated, codebook-quantized weights (TurboQuant, arXiv 2504.19874, algorithm 1)."""

    def __init__(self, weight: PackedWeight, bias: mx.array | None = None, qjl: Correction | None = None) -> None:
        super().__init__(weight, bias)
        self._qjl = qjl

    @classmethod
    def from_quantized(cls, weight: QuantizedWeight, bias: mx.array | None = None) -> "TurboQuantLinear":
        """The layer of a weight as `quantizer.quantize_weight` returns it."""
        return cls(packed_weight([weight]), bias, weight.residual)

    @property
    def corrected(self) -> bool:
        """Whether QJL's residual is added to the product."""
        return self._qjl is not None

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


class FastEmbedding(nn.Module):
    """Token embeddings (vocabulary, width), also used as the output projection where they are tied.

    dtype: of the activations.
    """

    def __init__(self, weight: DenseWeight | PackedWeight, dtype: mx.Dtype) -> None:
        super().__init__()
        self._weight, self._dtype = weight, dtype

    def __call__(self, tokens: mx.array) -> mx.array:
        return embed(tokens, self._weight).astype(self._dtype)

    @property
    def weight(self) -> mx.array:
        """The embeddings of all tokens, decoded anew, for models that read them."""
        return self(mx.arange(self._weight.shape[0]))

    def as_linear(self, x: mx.array) -> mx.array:
        """Logits (..., vocabulary) of hidden states (..., width)."""
        return matmul(x, self._weight)
