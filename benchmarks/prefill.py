"""Memory that reading a long prompt takes besides weights and cache, with random weights on a GPU.

    python -m benchmarks.prefill [--layers 32] [--tokens 2048 4096 32768]

A prompt is read 2,048 tokens at a time, so what a step takes must not grow with what was read before: then a
compressed cache is attended to where it lies and never expanded.
"""

import argparse
import statistics
import time
from typing import Any

import mlx.core as mx
import mlx.nn as nn

import metal_kernels
from benchmarks.big_model import EIGHT_B, held_bytes, random_turboquant
from benchmarks.harness import command_of, prompt_of, report
from quant_engine.config import CacheConfig
from quant_engine.generate import cache_nbytes, make_cache, read_prompt

CACHES = {"mlx-lm": None, "8/4 bits": CacheConfig(8, 4), "3/3 bits": CacheConfig(3, 3)}
TURNS = 3


def measure(model: nn.Module, weight_bytes: int, name: str, tokens: int) -> dict[str, Any]:
    """One prompt: its speed, what its cache takes, and the most that was held besides that and the weights."""
    cache = make_cache(model, CACHES[name])
    held_bytes()
    mx.reset_peak_memory()
    metal_kernels.reset_paths()
    prompt, began = prompt_of(tokens), time.perf_counter()
    read_prompt(model, prompt, cache)
    mx.synchronize()
    seconds, kept = time.perf_counter() - began, cache_nbytes(cache)
    return {
        "cache": name, "tokens": tokens, "prompt_tokens_per_s": tokens / seconds, "weights_gb": weight_bytes / 1e9,
        "cache_gb": kept / 1e9, "peak_besides_gb": (mx.get_peak_memory() - weight_bytes - kept) / 1e9,
        "kernel_path": metal_kernels.kernel_path(),
    }  # fmt: skip


def in_turn(model: nn.Module, weight_bytes: int, tokens: int) -> list[dict[str, Any]]:
    """A prompt with each cache, the median of some turns of all after an uncounted one, which compiles kernels."""
    turns = [[measure(model, weight_bytes, name, tokens) for name in CACHES] for _ in range(1 + TURNS)][1:]
    return [median_of(list(of_one)) for of_one in zip(*turns, strict=True)]


def median_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of rows of one cache the last, with the median speed and the highest peak of all."""
    speed = statistics.median(row["prompt_tokens_per_s"] for row in rows)
    return rows[-1] | {"prompt_tokens_per_s": speed, "peak_besides_gb": max(row["peak_besides_gb"] for row in rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 32768])
    args = parser.parse_args()
    before = held_bytes()
    model = random_turboquant(EIGHT_B | {"num_hidden_layers": args.layers}, 3)
    weight_bytes = held_bytes() - before
    rows: list[dict[str, Any]] = []
    for tokens in args.tokens:
        rows += in_turn(model, weight_bytes, tokens)
        report("prefill", command_of("prefill", **vars(args)), rows)


if __name__ == "__main__":
    main()
