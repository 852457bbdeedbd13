"""Recall: a fact stated somewhere in a long text, asked for at its end; damage to a cache shows as lost facts."""

from dataclasses import dataclass
from typing import Any

import mlx.nn as nn
import numpy as np

from quant_engine.config import CacheConfig
from quant_engine.errors import InputError
from quant_engine.generate import check_room, continue_prompt, make_cache, read_prompt
from quant_engine.progress import Progress, silent
from quant_engine.text import Text, load_text

NAMES = (
    "Oslo", "Paris", "Berlin", "Madrid", "Vienna", "Prague", "Warsaw", "Dublin", "London", "Athens",
    "Boston", "Chicago", "Denver", "Dallas", "Toronto", "Sydney", "Cairo", "Tokyo", "Delhi", "Moscow",
)  # fmt: skip
"""Whose secret codes are stated and asked for."""

DIGITS = 5


@dataclass(frozen=True)
class Question:
    """A prompt that states a fact at `depth` (0: start, 1: end) and asks for it, and the answer expected."""

    tokens: list[int]
    answer: str
    answer_tokens: int
    depth: float


@dataclass(frozen=True)
class RecallResult:
    """How many questions were asked, how many answered exactly, and the depths of those that were not."""

    asked: int
    answered: int
    missed_depths: tuple[float, ...]


def recall(
    model: nn.Module,
    tokenizer: Any,
    *,
    tokens: int,
    questions: int = 20,
    cache: CacheConfig | None = None,
    seed: int = 0,
    text: Text | None = None,
    progress: Progress = silent,
) -> RecallResult:
    """Ask `questions` questions, each at the end of a prompt of exactly `tokens` tokens, and decode greedily.

    The fact of each lies at another depth, evenly from start to end, in a passage of `text` (None: the built-in
    one). `cache` compresses the key-value cache as it is filled. Raises InputError where the prompt does not fit
    the model, or the text or the length is too short.
    """
    asked = make_questions(tokenizer, text or load_text(), tokens=tokens, questions=questions, seed=seed)
    missed: list[float] = []
    for number, question in enumerate(asked, 1):
        if answer(model, tokenizer, question, cache) != question.answer:
            missed.append(question.depth)
        progress(number, questions, f"question {number} of {questions} at {tokens} tokens")
    return RecallResult(questions, questions - len(missed), tuple(missed))


def make_questions(tokenizer: Any, text: Text, *, tokens: int, questions: int, seed: int) -> list[Question]:
    """The questions that `recall` asks; the same seed gives the same."""
    if questions < 1:
        raise InputError(f"questions is {questions}; ask at least 1")
    filler = tokenizer.encode(text.text, add_special_tokens=False, verbose=False)
    random = np.random.default_rng(seed)
    depths = np.linspace(0, 1, questions) if questions > 1 else np.array([0.5])
    return [_question(tokenizer, filler, tokens, float(depth), random) for depth in depths]


def _question(tokenizer: Any, filler: list[int], length: int, depth: float, random: np.random.Generator) -> Question:
    name = NAMES[random.integers(len(NAMES))]
    code = " ".join(str(digit) for digit in random.integers(0, 10, DIGITS))
    fact, ask, answered = (
        tokenizer.encode(piece, add_special_tokens=False)
        for piece in (
            f"\nThe secret code of {name} is {code}.\n",
            f"\nQuestion: What is the secret code of {name}? Answer:",
            f" {code}",
        )
    )
    room = length - len(fact) - len(ask)
    if room < 0 or len(filler) <= room:
        raise InputError(
            f"recall at {length} tokens needs at least {len(fact) + len(ask)} for the question and a text of "
            f"{max(room, 0)} for the rest, which has {len(filler)}; choose another length, or a longer text"
        )
    start = int(random.integers(len(filler) - room))
    passage, cut = filler[start : start + room], round(depth * room)
    return Question([*passage[:cut], *fact, *passage[cut:], *ask], code, len(answered), depth)


def answer(model: nn.Module, tokenizer: Any, question: Question, cache: CacheConfig | None) -> str:
    """The model's greedy answer, as many tokens as the right one has."""
    room = check_room(model, question.tokens, question.answer_tokens)
    held = make_cache(model, cache)
    read_prompt(model, question.tokens[:-1], held)
    return continue_prompt(model, tokenizer, question.tokens, held, room).text.strip()
