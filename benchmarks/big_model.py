"""A Llama of 8.0 billion parameters with random weights on a GPU: decoding in bfloat16, affine and TurboQuant.

    python -m benchmarks.big_model [--layers 32] [--bits 3 4] [--tokens 128]

Nothing is downloaded or written to disk: codes are random bits, which take as long to read as real ones. Every model is
driven by mlx-lm's own `generate_step`, and only one is in memory at a time. TurboQuant's default leaves embeddings in
full precision, affine, as `mlx_lm.convert -q`, does not.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

import metal_kernels
from benchmarks.end_to_end import LARGE
from benchmarks.harness import report, save
from quant_engine import QuantConfig, loader
from quant_engine import mlx_lm_adapter as adapter
from quant_engine.fast_layers import fuse_feed_forward
from quant_engine.fused_layer import fuse_decoder_layers
from quant_engine.kv_cache import convert_cache_to_turboquant
from quant_engine.manifest import Manifest, ModuleEntry
from quant_engine.model_step import fuse_model
from quant_engine.rotation import choose_block

EIGHT_B = LARGE | {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128, "vocab_size": 128256,
}  # fmt: skip
ROUNDS = 3
DTYPE = mx.bfloat16


def random_float(config: dict[str, Any]) -> nn.Module:
    """mlx-lm's model with normal weights of small size."""
    model = adapter.build(config)

    def draw(path: str, value: mx.array) -> mx.array:
        return mx.ones(value.shape, DTYPE) if value.ndim == 1 else mx.random.normal(value.shape, DTYPE) * 0.02

    model.update(tree_map_with_path(draw, model.parameters()))
    mx.eval(model.parameters())
    return model


def random_affine(config: dict[str, Any], bits: int) -> nn.Module:
    """The same quantized as `mlx_lm.convert -q` does, embeddings and head included."""
    model = random_float(config)
    nn.quantize(model, group_size=64, bits=bits)
    mx.eval(model.parameters())
    return model


def random_turboquant(config: dict[str, Any], bits: int) -> nn.Module:
    """The same as a conversion with the default recipe gives it, with random codes."""
    model = adapter.build(config)
    modules = {
        path: ModuleEntry(bits, 64, choose_block(layer.weight.shape[1], "auto"), layer.weight.shape)
        for path, layer in adapter.linear_modules(model).items()
    }
    tensors = {f"{path}.{name}": _random(dtype, shape)
               for path, entry in modules.items() for name, (dtype, shape) in entry.tensors().items()}  # fmt: skip
    for path, value in nn.utils.tree_flatten(model.parameters()):
        if path.rpartition(".")[0] not in modules:
            tensors[path] = mx.ones(value.shape, DTYPE) * (1.0 if value.ndim == 1 else 0.02)
    manifest = Manifest.of(QuantConfig(bits=bits), modules, {}, {})
    model = loader.assemble(config, manifest, tensors, DTYPE, True)
    fuse_feed_forward(model)
    fuse_decoder_layers(model)
    fuse_model(model)
    adapter.route(model)
    mx.eval(model.parameters())
    return model


def _random(dtype: str, shape: tuple[int, ...]) -> mx.array:
    if dtype == "U32":
        return mx.random.randint(0, 0xFFFFFFFF, shape, dtype=mx.uint32)
    return mx.full(shape, 0.02, mx.float16)


def speeds(model: nn.Module, prompt: int, tokens: int, cache_bits: tuple[int, int] | None) -> tuple[float, float]:
    """Prompt and generated tokens a second, medians of ROUNDS after one to warm up."""
    read, made = zip(*(_turn(model, prompt, tokens, cache_bits) for _ in range(ROUNDS + 1)), strict=True)
    return statistics.median(read[1:]), statistics.median(made[1:])


def _turn(model: nn.Module, prompt: int, tokens: int, cache_bits: tuple[int, int] | None) -> tuple[float, float]:
    cache: list[Any] = make_prompt_cache(model)
    if cache_bits:
        cache = convert_cache_to_turboquant(cache, k_bits=cache_bits[0], v_bits=cache_bits[1])
    ids = mx.array([101 + (7919 * i) % 4000 for i in range(prompt)])
    began = time.perf_counter()
    steps = generate_step(ids, model, max_tokens=tokens, prompt_cache=cache)
    next(steps)
    read = time.perf_counter()
    made = sum(1 for _ in steps)
    return prompt / (read - began), made / (time.perf_counter() - read)


def measure(config: dict[str, Any], bits: list[int], prompt: int, tokens: int) -> Iterator[list[dict[str, Any]]]:
    """Rows of method, speeds, and their ratios to bfloat16 and to affine at 4 bits: those there are, and one more."""
    kinds: list[tuple[str, int, Callable[[], nn.Module], tuple[int, int] | None]] = [
        ("mlx-lm bfloat16", 16, lambda: random_float(config), None),
        ("mlx-lm affine", 4, lambda: random_affine(config, 4), None),
        *(("turboquant", b, lambda b=b: random_turboquant(config, b), None) for b in bits),
        ("turboquant, cache at 8/4 bits", bits[0], lambda: random_turboquant(config, bits[0]), (8, 4)),
    ]
    rows: list[dict[str, Any]] = []
    for method, width, make, cache_bits in kinds:
        model = make()
        mx.reset_peak_memory()
        metal_kernels.reset_paths()
        read, made = speeds(model, prompt, tokens, cache_bits)
        rows.append({"method": method, "bits": width, "prompt_tokens_per_s": read, "generation_tokens_per_s": made,
                     "peak_gb": mx.get_peak_memory() / 1e9, "kernel_path": metal_kernels.kernel_path()})  # fmt: skip
        print(f"  {method} {width}: prompt {read:,.0f}, generation {made:,.1f} tokens a second", flush=True)
        del model
        gc.collect()
        mx.clear_cache()
        for row in rows:
            for name, base in zip(("bfloat16", "affine"), rows[:2], strict=False):
                row[f"generation_times_{name}"] = row["generation_tokens_per_s"] / base["generation_tokens_per_s"]
                row[f"prompt_times_{name}"] = row["prompt_tokens_per_s"] / base["prompt_tokens_per_s"]
        yield rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    args = parser.parse_args()
    config = EIGHT_B | {"num_hidden_layers": args.layers}
    bits = " ".join(map(str, args.bits))
    command = f"python -m benchmarks.big_model --bits {bits} --prompt {args.prompt} --tokens {args.tokens}"
    rows: list[dict[str, Any]] = []
    for rows in measure(config, args.bits, args.prompt, args.tokens):
        save("big_model", command, rows)
    report("big_model", command, rows)


if __name__ == "__main__":
    main()
