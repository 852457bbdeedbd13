"""Perplexity: a text cut into windows, and what the scores of the windows amount to."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant_engine.errors import InputError
from quant_engine.score import Score
from quant_engine.text import Text


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error over windows; None where there is one window only."""

    value: float
    stderr: float | None


def windows(
    tokenizer: Any, text: Text, seq_len: int, num_samples: int, *, own_length: bool = True
) -> NDArray[np.int32]:
    """The first non-overlapping windows of a text (windows, seq_len), tokenized whole without special tokens.

    Fewer than num_samples where the text ends before. own_length: whether seq_len is the user's choice. Raises
    InputError for lengths and counts that make no sense and for a text too short for one window.
    """
    if seq_len < 2:
        raise InputError(f"seq_len is {seq_len}; a window needs at least 2 tokens, since its first is not scored")
    if num_samples < 1:
        raise InputError(f"num_samples is {num_samples}; at least 1 window is needed")
    tokens = tokenizer.encode(text.text, add_special_tokens=False, verbose=False)
    count = min(num_samples, len(tokens) // seq_len)
    if count == 0:
        shorter = f", or a seq_len of at most {max(len(tokens), 2)}" if own_length else ""
        raise InputError(
            f"text {text.name!r} has {len(tokens)} tokens and one window needs {seq_len}; give a longer text{shorter}"
        )
    return np.array(tokens[: count * seq_len], dtype=np.int32).reshape(count, seq_len)


def perplexity(scores: Sequence[Score]) -> Estimate:
    """exp of the mean negative log-likelihood over all positions; windows must have the same length.

    Raises InputError where that is beyond any number.
    """
    losses = _losses(scores)
    value = _exp(losses.mean())
    return Estimate(value, _stderr(losses, value))


def difference(scores: Sequence[Score], reference: Sequence[Score]) -> Estimate:
    """Perplexity less the reference's on the same windows; the standard error takes windows as pairs."""
    losses, baseline = _losses(scores), _losses(reference)
    value, base = _exp(losses.mean()), _exp(baseline.mean())
    return Estimate(value - base, _stderr(losses - base / value * baseline, value))


def _losses(scores: Sequence[Score]) -> NDArray[np.float64]:
    return np.array([s.nll / s.positions for s in scores])


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError as error:
        raise InputError(
            f"the model's mean loss is {loss:.0f} nats a token, too much for a perplexity; its weights are damaged: "
            "download the model again, or convert it anew with more bits"
        ) from error


def _stderr(values: NDArray[np.float64], scale: float) -> float | None:
    """Standard error of the mean, scaled; scaled by exp(mean), to first order that of exp(mean)."""
    return float(scale * values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
