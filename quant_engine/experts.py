"""Linear layers of a mixture of experts, one module for all experts, in the place of mlx-lm's."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from metal_kernels import AffineWeight, DenseWeight, Experts, expert_matmul
from quant_engine.config import QuantConfig
from quant_engine.linear import packed_weight
from quant_engine.quantizer import QuantizedWeight, quantize_weight


class ExpertsLinear(nn.Module):
    """y = x W_e^T + b_e, where e is the expert chosen for each row; called as mlx-lm's `SwitchLinear` is.

    x (..., rows, in), indices of any shape that x's axes before the last two broadcast to; y is
    (*indices.shape, rows, out) in x's dtype. bias (experts, out).
    """

    def __init__(self, experts: Experts, bias: mx.array | None = None) -> None:
        super().__init__()
        self._experts = experts
        if bias is not None:
            self.bias = bias
            self.freeze(keys=["bias"])

    @property
    def weight_nbytes(self) -> int:
        """Bytes of all experts' weights in their file's form."""
        return self._experts.nbytes

    @property
    def shape(self) -> tuple[int, int, int]:
        """(experts, out, in)."""
        experts, rows, width = self._experts.shape
        return experts, rows, width

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        y = expert_matmul(x, self._experts, indices, sorted_indices)
        return y + mx.expand_dims(self.bias[indices], -2).astype(y.dtype) if "bias" in self else y


class DenseExperts(ExpertsLinear):
    """Experts in full precision."""

    def __init__(self, weight: mx.array, bias: mx.array | None = None) -> None:
        super().__init__(Experts([DenseWeight(weight[e]) for e in range(weight.shape[0])]), bias)
        self._whole = weight

    @property
    def weight(self) -> mx.array:
        """The weight (experts, out, in) as it came."""
        return self._whole


class TurboQuantExperts(ExpertsLinear):
    """Experts with rotated, codebook-quantized weights; they share signs and codebook."""

    def __init__(self, weights: Sequence[Sequence[QuantizedWeight]], bias: mx.array | None = None) -> None:
        """weights: for each expert one matrix, or several that share an input and are stacked, rows in order."""
        super().__init__(Experts([packed_weight(parts) for parts in weights]), bias)


def quantized_experts(weight: mx.array, bias: mx.array | None, config: QuantConfig) -> TurboQuantExperts:
    """Experts (experts, out, in) quantized one after another."""
    return TurboQuantExperts([[quantize_weight(weight[e], config)] for e in range(weight.shape[0])], bias)


def affine_experts(weight: mx.array, bias: mx.array | None, bits: int, group_size: int) -> ExpertsLinear:
    """Experts (experts, out, in) quantized as MLX does it."""
    coded = [mx.quantize(weight[e], group_size=group_size, bits=bits) for e in range(weight.shape[0])]
    mx.eval(coded)
    return ExpertsLinear(Experts([AffineWeight(*parts, bits, group_size) for parts in coded]), bias)
