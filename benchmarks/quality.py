"""What compression costs `wiki-qwen2-29m`: perplexity against transformers, every method, recall with each cache.

python -m benchmarks.quality [--part references weights recall]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import SHARED, report
from quant_engine.compare import DEFAULT_CACHES
from quant_engine.config import CacheConfig
from quant_engine.evaluate import evaluate
from quant_engine.loader import load
from quant_engine.recall import recall
from quant_engine.text import load_text

MODEL = SHARED / "models" / "wiki-qwen2-29m"
IN_DOMAIN, OUT_OF_DOMAIN = SHARED / "data" / "enwiki_dev.txt", SHARED / "data" / "wikitext2_valid.txt"

# transformers 5.17.0, torch 2.13.0 on a CPU, float32, text tokenized whole without special tokens, the first windows;
# 5.24.0 gave the same on the first two.
TRANSFORMERS = (
    (IN_DOMAIN, 512, 64, 30.801159), (IN_DOMAIN, 1024, 32, 29.011867),
    (OUT_OF_DOMAIN, 512, 64, 54.500286), (OUT_OF_DOMAIN, 1024, 32, 48.934607),
)  # fmt: skip
RECALL_CACHES = (None, *DEFAULT_CACHES, CacheConfig(2, 2))
COMMAND = "python -m benchmarks.quality"


def references() -> list[dict[str, Any]]:
    """Perplexity in full precision beside transformers' on the same tokens."""
    rows: list[dict[str, Any]] = []
    for text, seq_len, windows, expected in TRANSFORMERS:
        measured = evaluate(MODEL, bits=(), text=load_text(text), seq_len=seq_len, num_samples=windows).rows[0].ppl
        rows.append({
            "text": text.name, "seq_len": seq_len, "windows": windows, "transformers": expected,
            "ppl": measured, "off_percent": 100 * (measured / expected - 1),
        })  # fmt: skip
    report("perplexity_references", COMMAND, rows)
    return rows


def weights(seq_len: int = 1024, num_samples: int = 24) -> dict[str, Any]:
    """Every method at every width on held-out Wikipedia."""
    measured = evaluate(
        MODEL, bits=(4, 3, 2), text=load_text(IN_DOMAIN), seq_len=seq_len, num_samples=num_samples, progress=_line
    )
    base = measured.rows[0].ppl
    rows = [
        {
            "method": row.method, "bits": row.bits or 16, "bits_per_weight": row.bits_per_weight, "ppl": row.ppl,
            "cost_percent": 100 * (row.ppl / base - 1), "paired_stderr": paired.stderr if paired else None,
            "kl": row.kl, "top1": row.top1, "kernel_path": row.kernel_path,
        }
        for row, paired in zip(measured.rows, measured.differences, strict=True)
    ]  # fmt: skip
    report("quality", COMMAND, rows, report=measured.to_dict())
    return measured.to_dict()


def recalled(path: Path, lengths: Sequence[int] = (512, 1900), questions: int = 20) -> list[dict[str, Any]]:
    """Questions that the model at `path` answers with each cache, out of `questions` for each length."""
    model, tokenizer = load(path)
    text = load_text(IN_DOMAIN)
    rows: list[dict[str, Any]] = []
    for cache in RECALL_CACHES:
        row: dict[str, Any] = {"keys": cache.k_bits if cache else 16, "values": cache.v_bits if cache else 16}
        for tokens in lengths:
            result = recall(
                model, tokenizer, tokens=tokens, questions=questions, cache=cache, text=text, progress=_line
            )
            row[f"answered_at_{tokens}"] = result.answered
        rows.append({**row, "asked": questions})
    report("recall", COMMAND, rows, model=path.name)
    return rows


def _line(done: int, total: int, message: str) -> None:
    print(f"\r{done}/{total} {message}".ljust(78), end="" if done < total else "\n", flush=True)


PARTS = ("references", "weights", "recall")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--recall-model", type=Path, default=MODEL, help="one that examples/teach_recall.py made, or any other"
    )
    args = parser.parse_args()
    for needed in (MODEL, IN_DOMAIN, OUT_OF_DOMAIN):
        if not needed.exists():
            raise SystemExit(f"{needed.relative_to(SHARED.parent)} is not on this machine, and this benchmark needs it")
    if "references" in args.part:
        references()
    if "weights" in args.part:
        weights()
    if "recall" in args.part:
        recalled(args.recall_model)


if __name__ == "__main__":
    main()
