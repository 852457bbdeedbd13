"""A Llama of 8.0 billion parameters with random weights on a GPU: decoding in bfloat16, affine and TurboQuant.

    python -m benchmarks.big_model [--layers 32] [--bits 3 4] [--tokens 128] [--context 0 32768]

Nothing is downloaded or written to disk: codes are random bits, which take as long to read as real ones, and so are
keys and values of a context before the prompt. mlx-lm's own `generate_step` drives every model, and they take turns,
since a shared machine's processor is faster at one time than at another: 40 GB of memory. TurboQuant's default leaves
embeddings in full precision, affine, as `mlx_lm.convert -q`, does not.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

import metal_kernels
from benchmarks.end_to_end import LARGE
from benchmarks.harness import command_of, prompt_of, report
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
    for path, value in tree_flatten(model.parameters()):
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


@dataclass(frozen=True)
class Contender:
    """A model, the bytes that it takes, and how many bits of keys and values it caches, if it compresses them."""

    method: str
    bits: int
    model: nn.Module
    nbytes: int
    cache_bits: tuple[int, int] | None = None


def contenders(config: dict[str, Any], all_bits: Sequence[int]) -> list[Contender]:
    """Who takes turns; the first two are what the others are compared with."""
    kinds: list[tuple[str, int, Callable[[], nn.Module]]] = [
        ("mlx-lm bfloat16", 16, lambda: random_float(config)),
        ("mlx-lm affine", 4, lambda: random_affine(config, 4)),
        *(("turboquant", bits, lambda bits=bits: random_turboquant(config, bits)) for bits in all_bits),
    ]
    made: list[Contender] = []
    for method, bits, make in kinds:
        before = held_bytes()
        model = make()
        made.append(Contender(method, bits, model, held_bytes() - before))
    return [*made, replace(made[2], method="turboquant, cache at 8/4 bits", cache_bits=(8, 4))]


def held_bytes() -> int:
    """What MLX's arrays take now, with nothing kept for reuse."""
    gc.collect()
    mx.clear_cache()
    return mx.get_active_memory()


@dataclass(frozen=True)
class Turn:
    """Prompt and generated tokens a second, memory at most besides other models' weights, and what ran."""

    read: float
    made: float
    peak: int
    path: str


def measure(everyone: Sequence[Contender], case: Case) -> list[dict[str, Any]]:
    """Rows of medians of ROUNDS turns, after one to warm up, and of their ratios to the first two contenders."""
    turns = [[_turn(contender, case) for contender in everyone] for _ in range(ROUNDS + 1)][1:]
    rows: list[dict[str, Any]] = []
    for contender, own in zip(everyone, zip(*turns, strict=True), strict=True):
        read, made = statistics.median(turn.read for turn in own), statistics.median(turn.made for turn in own)
        row: dict[str, Any] = {
            "context": case.context, "method": contender.method, "bits": contender.bits, "prompt_tokens_per_s": read,
            "generation_tokens_per_s": made, "peak_gb": own[-1].peak / 1e9, "kernel_path": own[-1].path,
        }  # fmt: skip
        for name, base in zip(("bfloat16", "affine"), rows[:2], strict=False):
            row[f"generation_times_{name}"] = made / base["generation_tokens_per_s"]
            row[f"prompt_times_{name}"] = read / base["prompt_tokens_per_s"]
        rows.append(row)
    return rows


def _turn(contender: Contender, case: Case) -> Turn:
    model, others = contender.model, held_bytes() - contender.nbytes
    mx.reset_peak_memory()
    metal_kernels.reset_paths()
    cache: list[Any] = make_prompt_cache(model)
    for i, layer in enumerate(cache if case.context else []):
        shape = 2, 1, EIGHT_B["num_key_value_heads"], case.context, EIGHT_B["head_dim"]
        held = mx.random.normal(shape, DTYPE, key=mx.random.key(i))
        layer.update_and_fetch(held[0], held[1])
    if contender.cache_bits:
        k_bits, v_bits = contender.cache_bits
        cache = convert_cache_to_turboquant(cache, k_bits=k_bits, v_bits=v_bits)
    mx.eval([layer.state for layer in cache if not layer.empty()])
    ids = mx.array(prompt_of(case.prompt))
    began = time.perf_counter()
    steps = generate_step(ids, model, max_tokens=case.tokens, prompt_cache=cache)
    next(steps)
    read = time.perf_counter()
    made = sum(1 for _ in steps) / (time.perf_counter() - read)
    return Turn(case.prompt / (read - began), made, mx.get_peak_memory() - others, metal_kernels.kernel_path())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--context", type=int, nargs="+", default=[0], help="tokens held before the prompt")
    args = parser.parse_args()
    config = EIGHT_B | {"num_hidden_layers": args.layers}
    everyone = contenders(config, args.bits)
    rows: list[dict[str, Any]] = []
    for context in args.context:
        rows += measure(everyone, Case(context, args.prompt, args.tokens))
        report("big_model", command_of("big_model", **vars(args)), rows)


if __name__ == "__main__":
    main()
