"""How well next-token distributions predict a text, and how far they are from a reference's."""

from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from quant_engine.errors import InputError

_ROWS = 64
"""Rows scored at a time, so that what is in between stays in the processor's cache."""


@dataclass(frozen=True)
class Score:
    """Sums over positions: of the negative log-likelihood and the divergence in nats, and of agreements.

    kl is of KL(reference || scored), top1 counts positions where both have the same most likely token; both
    are None where there is no reference.
    """

    positions: int
    nll: float
    kl: float | None
    top1: int | None


def logits_array(logits: mx.array) -> NDArray[np.float32]:
    """Logits (positions, vocabulary) in float32 in the process's memory."""
    return cast(NDArray[np.float32], np.asarray(logits.astype(mx.float32)))


def score(logits: NDArray[np.float32], targets: NDArray[Any], reference: NDArray[np.float32] | None = None) -> Score:
    """Score logits (positions, vocabulary) against the next tokens (positions,) and a reference's logits.

    Log-sum-exp in float32, sums over positions in float64. Raises InputError where a number is not finite.
    """
    nll, kl, top1 = 0.0, 0.0, 0
    for start in range(0, len(targets), _ROWS):
        rows = slice(start, start + _ROWS)
        scored = log_softmax(logits[rows])
        nll -= float(np.take_along_axis(scored, targets[rows, None], 1).sum(dtype=np.float64))
        if reference is not None:
            expected = log_softmax(reference[rows])
            kl += float((np.exp(expected) * (expected - scored)).sum(-1).sum(dtype=np.float64))
            top1 += int((expected.argmax(-1) == scored.argmax(-1)).sum())
    if not np.isfinite(nll) or not np.isfinite(kl):
        raise InputError(
            "the model's predictions are not finite numbers; its weights overflow in this precision: "
            "load it with dtype float32, or quantize it with more bits"
        )
    return Score(len(targets), nll, *((None, None) if reference is None else (kl, top1)))


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Natural logarithms of the softmax over the last axis."""
    with np.errstate(invalid="ignore"):  # infinities become NaN, which `score` refuses
        shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
