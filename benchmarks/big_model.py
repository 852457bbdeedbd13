"""A Llama of 8.0 billion parameters with random weights on a GPU: decoding in bfloat16, affine and TurboQuant.

    python -m benchmarks.big_model [--layers 32] [--bits 3 4] [--tokens 128] [--context 0 32768]

Nothing is downloaded or written to disk: codes are random bits, which take as long to read as real ones, and so are
keys and values of a context before the prompt. mlx-lm's own `generate_step` drives every model, and only one is in
memory at a time. TurboQuant's default leaves embeddings in full precision, affine, as `mlx_lm.convert -q`, does not.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Case:
    """How many tokens there are before the prompt, in it, and after it."""

    context: int
    prompt: int
    tokens: int


def speeds(model: nn.Module, case: Case, cache_bits: tuple[int, int] | None) -> tuple[float, float]:
    """Prompt and generated tokens a second, medians of ROUNDS after one to warm up."""
    read, made = zip(*(_turn(model, case, cache_bits) for _ in range(ROUNDS + 1)), strict=True)
    return statistics.median(read[1:]), statistics.median(made[1:])


def _turn(model: nn.Module, case: Case, cache_bits: tuple[int, int] | None) -> tuple[float, float]:
    cache: list[Any] = make_prompt_cache(model)
    for i, layer in enumerate(cache if case.context else []):
        shape = 2, 1, EIGHT_B["num_key_value_heads"], case.context, EIGHT_B["head_dim"]
        held = mx.random.normal(shape, DTYPE, key=mx.random.key(i))
        layer.update_and_fetch(held[0], held[1])
    if cache_bits:
        cache = convert_cache_to_turboquant(cache, k_bits=cache_bits[0], v_bits=cache_bits[1])
    mx.eval([layer.state for layer in cache if not layer.empty()])
    ids = mx.array([101 + (7919 * i) % 4000 for i in range(case.prompt)])
    began = time.perf_counter()
    steps = generate_step(ids, model, max_tokens=case.tokens, prompt_cache=cache)
    next(steps)
    read = time.perf_counter()
    made = sum(1 for _ in steps)
    return case.prompt / (read - began), made / (time.perf_counter() - read)


def measure(config: dict[str, Any], bits: list[int], cases: list[Case]) -> Iterator[list[dict[str, Any]]]:
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
        for case in cases:
            mx.reset_peak_memory()
            metal_kernels.reset_paths()
            read, made = speeds(model, case, cache_bits)
            row = {"context": case.context, "method": method, "bits": width, "prompt_tokens_per_s": read,
                   "generation_tokens_per_s": made, "peak_gb": mx.get_peak_memory() / 1e9,
                   "kernel_path": metal_kernels.kernel_path()}  # fmt: skip
            bases = [base for base in rows if base["context"] == case.context][:2]
            for name, base in zip(("bfloat16", "affine"), bases, strict=False):
                row[f"generation_times_{name}"] = made / base["generation_tokens_per_s"]
                row[f"prompt_times_{name}"] = read / base["prompt_tokens_per_s"]
            rows.append(row)
            print(f"  {row}", flush=True)
            yield rows
        del model
        gc.collect()
        mx.clear_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--context", type=int, nargs="+", default=[0], help="tokens held before the prompt")
    args = parser.parse_args()
    config = EIGHT_B | {"num_hidden_layers": args.layers}
    bits = " ".join(map(str, args.bits))
    contexts = " ".join(map(str, args.context))
    command = f"python -m benchmarks.big_model --bits {bits} --prompt {args.prompt} --tokens {args.tokens}"
    command += f" --context {contexts}"
    cases = [Case(context, args.prompt, args.tokens) for context in args.context]
    rows: list[dict[str, Any]] = []
    for rows in measure(config, args.bits, cases):
        save("big_model", command, rows)
    report("big_model", command, rows)


if __name__ == "__main__":
    main()
