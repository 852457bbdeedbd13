"""What compression costs `wiki-qwen2-29m`: perplexity against transformers, every method, recall with each cache.

python -m benchmarks.quality [--part references weights recall]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import SHARED, report
from quant_engine.allocation import allocate
from quant_engine.compare import DEFAULT_CACHES
from quant_engine.config import CacheConfig, QuantConfig
from quant_engine.evaluate import compare_recipes, evaluate
from quant_engine.loader import load
from quant_engine.recall import recall
from quant_engine.source import resolve
from quant_engine.text import load_text
from quant_engine.variants import Recipe

MODEL = SHARED / "models" / "wiki-qwen2-29m"
IN_DOMAIN, OUT_OF_DOMAIN = SHARED / "data" / "enwiki_dev.txt", SHARED / "data" / "wikitext2_valid.txt"

# transformers 5.17.0, torch 2.13.0 on a CPU, float32, text tokenized whole without special tokens, the first windows;
# 5.24.0 gave the same on the first two.
TRANSFORMERS = (
    (IN_DOMAIN, 512, 64, 30.801159), (IN_DOMAIN, 1024, 32, 29.011867),
    (OUT_OF_DOMAIN, 512, 64, 54.500286), (OUT_OF_DOMAIN, 1024, 32, 48.934607),
)  # fmt: skip
TARGETS = (4.0, 3.25, 3.0, 2.5)
"""Bits a weight that are shared out among layers."""

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


def recipes() -> list[tuple[Recipe, dict[str, Any]]]:
    """What is compared with full precision, and what a row says of it beside method, bits and groups."""
    found: list[tuple[Recipe, dict[str, Any]]] = []
    for bits in (4, 3, 2):
        searched, rms = QuantConfig(bits=bits), QuantConfig(bits=bits, scale="rms")
        found += [
            (Recipe("affine", searched), {}), (Recipe("turboquant", rms), {"scale": "rms"}),
            (Recipe("turboquant", searched), {}), (Recipe("turboquant+qjl", searched), {}),
        ]  # fmt: skip
    for target in TARGETS:
        shared_out = allocate(resolve(MODEL), QuantConfig(), target, progress=_line)
        found.append((Recipe("turboquant", shared_out), {"target_bpw": target}))
    return found


def weights(seq_len: int = 1024, num_samples: int = 24) -> dict[str, Any]:
    """Every method at every width, and bits and groups shared out among layers, on held-out Wikipedia in one run."""
    compared = recipes()
    measured = compare_recipes(
        resolve(MODEL), [recipe for recipe, _ in compared], load_text(IN_DOMAIN),
        seq_len=seq_len, num_samples=num_samples, progress=_line,
    )  # fmt: skip
    base, whole = measured.rows[0].ppl, measured.to_dict()
    extras = [{}, *(extra for _, extra in compared)]
    for row, extra, paired in zip(whole["rows"], extras, measured.differences, strict=True):
        row |= {"cost": row["ppl"] / base - 1, "paired_stderr": paired.stderr if paired else None, **extra}
    columns = ("method", "bits", "scale", "target_bpw", "bits_per_weight", "ppl", "cost", "paired_stderr", "kl", "top1")
    rows = [{name: row[name] for name in columns if name in row} for row in whole["rows"]]
    report("quality", COMMAND, rows, report=whole)
    return whole


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
