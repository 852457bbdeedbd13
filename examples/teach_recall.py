"""Continue training a small checkpoint until it answers the questions that `quant_engine.recall` asks.

    python examples/teach_recall.py MODEL OUT --text TEXT [--steps 150]

A checkpoint that cannot answer them at full precision says nothing about what a compressed cache loses. Documents are
passages of TEXT into which secret codes were put, with questions about them at the end; answers weigh eight times.
Needs torch and transformers, which the project does not. With 29 million parameters: 5 minutes on two CPU cores.
"""

import argparse
import lzma
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quant_engine.recall import DIGITS, NAMES

LENGTHS = (160, 256, 512)
LONG = (512, 1024, 1900)
"""Lengths of documents, short ones in the first half of the steps, long ones in the second."""

TOKENS = 2048
"""Of a step."""

ANSWER = 8.0
"""How much a token of an answer counts, against one of any other."""

RATE = 3e-4


@dataclass
class Documents:
    """Passages of a text with facts and questions put in; tokens and their weights, the same for each seed."""

    tokenizer: Any
    text: list[int]
    random: random.Random

    def batch(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and weights (TOKENS / length, length)."""
        made = [self._document(length) for _ in range(max(1, TOKENS // length))]
        return torch.tensor([tokens for tokens, _ in made]), torch.tensor([weights for _, weights in made])

    def _document(self, length: int) -> tuple[list[int], list[float]]:
        names = self.random.sample(NAMES, self.random.randint(1, min(3, length // 110)))
        codes = {name: " ".join(str(self.random.randrange(10)) for _ in range(DIGITS)) for name in names}
        facts = [self._encode(f"\nThe secret code of {name} is {code}.\n") for name, code in codes.items()]
        asked = [
            (self._encode(f"\nQuestion: What is the secret code of {name}? Answer:"), self._encode(f" {code}"))
            for name, code in self.random.sample(sorted(codes.items()), len(codes))
        ]
        room = length - sum(map(len, facts)) - sum(len(part) for pair in asked for part in pair)
        start = self.random.randrange(len(self.text) - room)
        tokens = self._with(facts, self.text[start : start + room])
        weights = [1.0] * len(tokens)
        for question, answer in asked:
            tokens += question + answer
            weights += [1.0] * len(question) + [ANSWER] * len(answer)
        return tokens, weights

    def _with(self, facts: list[list[int]], passage: list[int]) -> list[int]:
        cuts = sorted(self.random.randint(0, len(passage)) for _ in facts)
        parts = [passage[a:b] for a, b in zip([0, *cuts], [*cuts, len(passage)], strict=True)]
        return [token for part, fact in zip(parts, [*facts, []], strict=True) for token in (*part, *fact)]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


def losses(model: Any, documents: Documents, steps: int) -> Iterator[tuple[int, float, float]]:
    """Train; after each step its number and the mean loss of answers and of other tokens."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 20) * (1 - 0.95 * step / steps)
        length = documents.random.choice(LENGTHS if step < steps / 2 else LONG)
        tokens, weights = documents.batch(length)
        logits = model(tokens, use_cache=False).logits[:, :-1]
        each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        counts = weights[:, 1:].flatten()
        optimizer.zero_grad()
        ((each * counts).sum() / counts.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield step + 1, float(each[counts > 1].mean().detach()), float(each[counts == 1].mean().detach())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="plain text, or .xz of it; its first 12 MB are used")
    parser.add_argument("--steps", type=int, default=150)
    args = parser.parse_args()
    torch.manual_seed(0)
    with lzma.open(args.text, "rt") if args.text.suffix == ".xz" else args.text.open() as file:
        text = file.read(12_000_000)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    parts = [text[i : i + 200_000] for i in range(0, len(text), 200_000)]
    ids = [token for part in parts for token in tokenizer.encode(part, add_special_tokens=False)]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    for step, answers, others in losses(model, Documents(tokenizer, ids, random.Random(1)), args.steps):
        if step % 10 == 0 or step == args.steps:
            print(f"step {step} of {args.steps}: loss of answers {answers:.3f}, of the rest {others:.3f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
