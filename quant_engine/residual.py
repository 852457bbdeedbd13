"""QJL: one more bit a weight that makes the product with any input unbiased.

A codebook's rounding error r = w - w_hat of a row (width d) is kept as d signs and one number. With a random
orthogonal S, the correction of a product with x is

    <r, x>  ~  sqrt(pi / (2 d)) * norm * <sign(S r), S x>

as in QJL (Zandieh et al., arXiv 2406.03482) and algorithm 2 of TurboQuant (arXiv 2504.19874), with two
changes. S is not a dense Gaussian matrix, which would cost as much as the layer itself, but two rounds of
random signs and blockwise Hadamard transforms with an interleaving between them, O(d log d). And `norm` is
not |r| but

    norm = |r|^2 / (sqrt(pi / (2 d)) * |S r|_1)

which differs from |r| by O(1/sqrt(d)) and makes the estimate exact for x = r. What is left of the error is
orthogonal to r and symmetric about zero; its variance, (pi/2 - 1) |r|^2 |x|^2 / d, is about a third of the
paper's bound of pi/2, because orthogonal projections do not repeat themselves. The bias over seeds is of
order 1/d of the error itself.

The bit comes on top of the code's: `bits=3, use_qjl=True` takes 3 + 1 bits a weight plus 16 for each row, as
turboquant-mlx's option of that name does. The paper's inner-product code of b bits is `bits = b - 1` with
QJL.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx

from metal_kernels import PackedWeight, hadamard_block, matmul, pack, rotate, unpack, unrotate
from quant_engine import rotation

_SEEDS = 2**63
"""Added to the model's seed, below 2^63, so that these signs are independent of the weights' rotation."""


@dataclass(frozen=True)
class Residual:
    """The signs and norms of a layer's rounding errors.

    signs uint32 (out, width / 32), bit 1 where S r is positive; norms float16 (out,); seed: the model's.
    """

    signs: mx.array
    norms: mx.array
    width: int
    seed: int

    @property
    def nbytes(self) -> int:
        """Bytes of signs and norms."""
        return self.signs.nbytes + self.norms.nbytes

    def apply(self, x: mx.array) -> mx.array:
        """Estimated products of the errors with x (..., width), not rotated: (..., out) in x's dtype."""
        first, _ = _signs(self.width, self.seed)
        return matmul(_interleave(rotate(x, first, hadamard_block(self.width))), self._weight)

    def dequantize(self) -> mx.array:
        """The matrix (out, width), float32, that `apply` multiplies by."""
        block, (first, second) = hadamard_block(self.width), _signs(self.width, self.seed)
        signs = unpack(self.signs, 1, self.width).astype(mx.float32) * 2 - 1
        scaled = signs * self.norms.astype(mx.float32)[:, None] * _constant(self.width)
        return unrotate(_interleave(unrotate(scaled, second, block), inverse=True), first, block)

    @cached_property
    def _weight(self) -> PackedWeight:
        """The second round and the signs, as a matrix of one-bit codes."""
        _, second = _signs(self.width, self.seed)
        unit = _constant(self.width)
        return PackedWeight(self.signs, self.norms[:, None], (-unit, unit), second, hadamard_block(self.width))


def project(error: mx.array, seed: int) -> Residual:
    """The residual of rounding errors (out, width), float32, in the domain of the layer's own input."""
    width = error.shape[1]
    block, (first, second) = hadamard_block(width), _signs(width, seed)
    projected = rotate(_interleave(rotate(error, first, block)), second, block)
    spread = mx.abs(projected).sum(-1) * _constant(width)
    norms = mx.square(error).sum(-1) / mx.where(spread > 0, spread, 1.0)
    return Residual(pack(projected > 0, 1), norms.astype(mx.float16), width, seed)


def _constant(width: int) -> float:
    return math.sqrt(math.pi / (2 * width))


def _signs(width: int, seed: int) -> tuple[mx.array, mx.array]:
    both = rotation.signs(2 * width, _SEEDS + seed)
    return mx.array(both[:width]), mx.array(both[width:])


def _interleave(x: mx.array, inverse: bool = False) -> mx.array:
    """Deal the Hadamard blocks of the last axis out like cards, so that the next round mixes all of them."""
    width = x.shape[-1]
    block = hadamard_block(width)
    if block == width:
        return x
    shape = (block, width // block) if inverse else (width // block, block)
    return x.reshape(*x.shape[:-1], *shape).swapaxes(-1, -2).reshape(x.shape)
