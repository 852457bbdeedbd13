"""Attention over packed keys and values against MLX's own over float ones.

    python -m benchmarks.attention [--tokens 1024 8192 32768] [--batch 1] [--caches 3/3 8/4] [--queries 1]

32 query heads and 8 key-value heads of 128. Times are of whole calls: rotating the queries and turning the result back
are in them, for the packed ones. On a GPU float is float16 and calls wait for each other, as a model's do: the result
of one is the next one's queries. On a CPU float is float32.
"""

import argparse
from typing import Any

import mlx.core as mx

import metal_kernels
from benchmarks.harness import Step, command_of, microseconds_in_turn, on_gpu, path_of, report
from quant_engine.kv_cache import cache_code

HEADS, KV_HEADS, SIZE, GROUP = 32, 8, 128, 64


def measure(batch: int, tokens: int, queries: int, caches: list[str]) -> list[dict[str, Any]]:
    """Rows of cache, microseconds and bytes for one length."""
    dtype = mx.float16 if on_gpu() else mx.float32
    q = mx.random.normal((batch, HEADS, queries, SIZE), dtype)
    count = 2 if batch * tokens * SIZE * KV_HEADS > 1 << 24 else 4
    whole = [mx.random.normal((batch, KV_HEADS, tokens, SIZE), dtype) for _ in range(count)]
    mx.eval(q, whole)
    mask, scale = "causal" if queries > 1 else None, SIZE**-0.5
    steps: list[Step] = [lambda q, i: mx.fast.scaled_dot_product_attention(
        q, whole[i % count], whole[(i + 1) % count], scale=scale, mask=mask)]  # fmt: skip
    sizes = [2 * batch * KV_HEADS * tokens * SIZE * dtype.size]
    for cache in caches:
        key_bits, value_bits = map(int, cache.split("/"))
        codes = cache_code(SIZE, key_bits, GROUP, 0), cache_code(SIZE, value_bits, GROUP, 1)
        held = [tuple(metal_kernels.pack_cache(x, code) for code in codes) for x in whole]
        mx.eval(held)
        steps.append(lambda q, i, held=held, codes=codes: metal_kernels.packed_attention(
            q, *held[i % count], *codes, length=tokens, scale=scale, mask=mask))  # fmt: skip
        sizes.append(sum(a.nbytes for pair in held[0] for a in pair))
    times = microseconds_in_turn(steps, q, 5)
    return [
        {"batch": batch, "tokens": tokens, "queries": queries, "cache": cache, "us": us, "times_float": times[0] / us,
         "path": "mlx" if cache == "float" else path_of(step, q), "mb": nbytes / 1e6}
        for cache, step, us, nbytes in zip(["float", *caches], steps, times, sizes, strict=True)
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    lengths = [1024, 8192, 32768, 131072] if on_gpu() else [1024, 8192]
    parser.add_argument("--tokens", type=int, nargs="+", default=lengths)
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--queries", type=int, nargs="+", default=[1])
    parser.add_argument("--caches", nargs="+", default=["3/3", "8/4"])
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for batch in args.batch:
        for tokens in args.tokens:
            for queries in args.queries:
                rows += measure(batch, tokens, queries, args.caches)
    report("attention", command_of("attention", **vars(args)), rows)


if __name__ == "__main__":
    main()
