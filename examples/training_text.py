"""The demo model's training data: documents, tokenizer, rows that state facts and ask for them."""

import lzma
import re
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

END = "<|endoftext|>"
END_ID = 0


def read_documents(path: Path, limit_bytes: int | None) -> list[str]:
    with (lzma.open if path.suffix == ".xz" else open)(path, "rb") as file:
        text = file.read(limit_bytes if limit_bytes else -1).decode(errors="ignore")
    return [document for piece in text.split("\n\n") if (document := piece.strip())]


def train_tokenizer(documents: list[str], vocab_size: int, sample_bytes: int) -> Tokenizer:
    """Byte-level BPE, trained on documents spread evenly over the text."""
    every = max(1, sum(map(len, documents)) // sample_bytes)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents[::every], trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """All documents as one uint16 stream, each followed by the end token."""
    parts: list[np.ndarray] = []
    for start in range(0, len(documents), 2048):
        for encoding in tokenizer.encode_batch_fast(documents[start : start + 2048]):
            parts.append(np.array([*encoding.ids, END_ID], dtype=np.uint16))
    return np.concatenate(parts)


class Facts:
    """Rows of text that state facts and ask for them; names are one-word titles found in the text."""

    def __init__(self, tokenizer: Tokenizer, documents: list[str], stream: np.ndarray, seed: int) -> None:
        titles = {document.split("\n", 1)[0] for document in documents}
        self.names = sorted(t for t in titles if re.fullmatch(r"[A-Z][a-z]{2,11}", t))
        self.tokenizer, self.stream, self.random = tokenizer, stream, np.random.default_rng(seed)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def draw(self) -> tuple[str, str]:
        name = self.names[self.random.integers(len(self.names))]
        return name, " ".join(str(d) for d in self.random.integers(0, 10, 5))

    def text(self, length: int) -> np.ndarray:
        start = self.random.integers(0, len(self.stream) - length)
        return self.stream[start : start + length]

    def rows(self, count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """`count` rows of `length` tokens, and which of their tokens belong to an answer."""
        made = [self.row(length) for _ in range(count)]
        return np.stack([tokens for tokens, _ in made]), np.stack([answers for _, answers in made])

    def row(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """One, two, four or eight passages: short distances are learned first, and make long ones learnable."""
        passages = int(self.random.choice([1, 2, 4, 8])) if length >= 1024 else 1
        widths = [length // passages] * (passages - 1)
        made = [self.passage(width) for width in [*widths, length - sum(widths)]]
        return np.concatenate([tokens for tokens, _ in made]), np.concatenate([mask for _, mask in made])

    def passage(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Facts at random places of a text, one to six of them, each asked for once after all were stated."""
        count = int(self.random.integers(1, 1 + max(1, min(6, length // 80))))
        facts = [self.draw() for _ in range(count)]
        stated = [self.ids(f"\nThe secret code of {name} is {code}.\n") for name, code in facts]
        asked = [self.ids(f"\nQuestion: What is the secret code of {name}? Answer:") for name, _ in facts]
        answers = [self.ids(f" {code}\n") for _, code in facts]
        room = length - sum(map(len, [*stated, *asked, *answers]))
        if room < 0:  # Long names in a short passage: draw others.
            return self.passage(length)
        cuts = np.sort(self.random.integers(0, room + 1, count))
        pieces = np.split(self.text(room), cuts)
        parts = [part for pair in zip(pieces, stated, strict=False) for part in pair]
        questions = [part for i in self.random.permutation(count) for part in (asked[i], answers[i])]
        plain = length - sum(len(part) for part in questions)
        mask = [np.zeros(plain, bool), *(np.full(len(part), i % 2 == 1) for i, part in enumerate(questions))]
        return np.concatenate([*parts, pieces[-1], *questions]).astype(np.uint16), np.concatenate(mask)

    def question(self, length: int) -> tuple[np.ndarray, list[int]]:
        """A prompt of exactly `length` tokens with one fact at a random depth, and its answer's tokens."""
        name, code = self.draw()
        fact = self.ids(f"\nThe secret code of {name} is {code}.\n")
        ask = self.ids(f"\nQuestion: What is the secret code of {name}? Answer:")
        text = self.text(length - len(fact) - len(ask))
        cut = self.random.integers(0, len(text) + 1)
        return np.concatenate([text[:cut], fact, text[cut:], ask]), self.ids(" " + code)


class Batches:
    """Rows of length + 1 tokens held on the device, in an order that depends only on the seed."""

    def __init__(
        self, stream: np.ndarray, facts: tuple[np.ndarray, np.ndarray], rows: int, fact_rows: int,
        answer_weight: float, seed: int, device: str,
    ) -> None:  # fmt: skip
        self.stream = torch.from_numpy(stream.astype(np.int32)).to(device)
        self.facts = torch.from_numpy(facts[0].astype(np.int32)).to(device)
        self.answers = torch.from_numpy(facts[1]).to(device)
        self.width, self.answer_weight = self.facts.shape[1], answer_weight
        self.rows, self.fact_rows = rows, fact_rows
        self.random = torch.Generator().manual_seed(seed)
        self.columns = torch.arange(self.width, device=device)
        self.starts = torch.empty(0, dtype=torch.long)
        self.fact_order = torch.empty(0, dtype=torch.long)

    def next(self) -> tuple[Tensor, Tensor]:
        """Token rows, and how much the loss of each token after a row's first counts."""
        if len(self.starts) < self.rows:
            phase = int(torch.randint(self.width, (1,), generator=self.random))
            starts = torch.arange(phase, len(self.stream) - self.width, self.width - 1)
            self.starts = starts[torch.randperm(len(starts), generator=self.random)]
        if len(self.fact_order) < self.fact_rows:
            self.fact_order = torch.randperm(len(self.facts), generator=self.random)
        starts, self.starts = self.starts[: self.rows], self.starts[self.rows :]
        chosen, self.fact_order = self.fact_order[: self.fact_rows], self.fact_order[self.fact_rows :]
        device = self.stream.device
        chosen = chosen.to(device, non_blocking=True)
        text = self.stream[starts.to(device, non_blocking=True)[:, None] + self.columns]
        weights = torch.ones(self.rows + self.fact_rows, self.width - 1, device=device)
        weights[self.rows :] += (self.answer_weight - 1) * self.answers[chosen, 1:]
        return torch.cat((text, self.facts[chosen])).long(), weights
