"""Windows of a text and what their scores amount to; the model's own value against transformers'."""

import math
from typing import Any

import numpy as np
import pytest

from quant_engine.errors import InputError
from quant_engine.perplexity import difference, perplexity, windows
from quant_engine.score import Score
from quant_engine.text import Text


class Letters:
    """A tokenizer with one token a letter, and a special token that nobody asked for."""

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool) -> list[int]:
        del verbose
        return [999] * add_special_tokens + [ord(letter) - ord("a") for letter in text]


TEXT = Text.of("letters", "abcdefghijk")


def scores(*losses: float, positions: int = 10) -> list[Score]:
    return [Score(positions, loss * positions, None, None) for loss in losses]


def test_windows_follow_each_other_without_overlap_or_special_tokens() -> None:
    assert windows(Letters(), TEXT, 4, 2).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_short_text_gives_the_windows_that_it_has() -> None:
    assert windows(Letters(), TEXT, 3, 100).shape == (3, 3)


@pytest.mark.parametrize(
    ("seq_len", "num_samples", "words"),
    [
        (12, 4, "'letters' has 11 tokens and one window needs 12; give a longer text, or a seq_len of at most 11"),
        (1, 4, "seq_len is 1; .* at least 2"),
        (4, 0, "num_samples is 0; at least 1"),
    ],
)
def test_lengths_that_cannot_be_are_refused(seq_len: int, num_samples: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        windows(Letters(), TEXT, seq_len, num_samples)


def test_a_length_that_is_not_the_users_is_not_advised_about() -> None:
    with pytest.raises(InputError, match=r"one window needs 12; give a longer text$"):
        windows(Letters(), TEXT, 12, 4, own_length=False)


def test_perplexity_is_the_exponential_of_the_mean_loss() -> None:
    estimate = perplexity(scores(1.0, 2.0, 3.0))
    assert estimate.value == pytest.approx(math.exp(2.0))
    assert estimate.stderr == pytest.approx(math.exp(2.0) / math.sqrt(3))


def test_one_window_has_no_standard_error() -> None:
    assert perplexity(scores(1.0)).stderr is None


def test_the_standard_error_matches_what_repetition_shows() -> None:
    random = np.random.default_rng(0)
    estimates = [perplexity(scores(*random.normal(3, 0.2, 40))) for _ in range(400)]
    spread = np.std([e.value for e in estimates])
    claimed = np.mean([e.stderr or 0 for e in estimates])
    assert claimed == pytest.approx(spread, rel=0.1)


def test_pairing_takes_out_what_windows_have_in_common() -> None:
    base = np.array([1.0, 2.0, 3.0, 4.0])
    paired = difference(scores(*(base + 0.1)), scores(*base))
    assert paired.value == pytest.approx(math.exp(2.6) - math.exp(2.5))
    apart = perplexity(scores(*base)).stderr
    assert paired.stderr is not None and apart is not None
    assert paired.stderr < 0.15 * apart


def test_nothing_differs_from_itself() -> None:
    same: Any = scores(1.0, 2.0)
    estimate = difference(same, same)
    assert (estimate.value, estimate.stderr) == (0.0, 0.0)


def test_a_loss_beyond_any_perplexity_is_refused() -> None:
    assert math.isfinite(perplexity(scores(690.0, 700.0)).stderr or math.nan)
    with pytest.raises(InputError, match="mean loss is 800 nats a token, too much for a perplexity"):
        perplexity(scores(800.0))
    with pytest.raises(InputError, match="mean loss is 800 nats"):
        difference(scores(800.0), scores(1.0))
