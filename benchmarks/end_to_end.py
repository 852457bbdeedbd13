"""Whole models on this machine: TurboQuant at 3 and 4 bits against mlx-lm's own 4-bit affine model, in one run.

    python -m benchmarks.end_to_end [--models small large]

small is the trained 29 M model beside the checkout where it is, otherwise the packaged one; large is a Llama of 378 M
parameters with random weights. On a CPU both sides compute in float32, MLX's fastest there.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import stream_generate
from mlx_lm.utils import load_model, load_tokenizer
from tokenizers import Tokenizer, models

import metal_kernels
from benchmarks.harness import SHARED, command_of, prompt_of, report
from quant_engine import CacheConfig, QuantConfig, convert, load
from quant_engine.generate import continue_prompt, make_cache, rate, read_prompt
from quant_engine.safetensors_file import TensorSpec, assign_shards, index_json
from quant_engine.source import INDEX
from tq_mcp import demo_model

LARGE = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "intermediate_size": 5632,
    "num_hidden_layers": 8, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 8192,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 4096, "tie_word_embeddings": False,
    "hidden_act": "silu",
}  # fmt: skip
ROUNDS = 3
VARIANTS = (
    ("turboquant", 3, None),
    ("turboquant", 4, None),
    ("turboquant, cache at 8/4 bits", 3, CacheConfig(8, 4)),
)


def write_random_llama(folder: Path, config: dict[str, Any], file_bytes: int = 10**12) -> None:
    """A checkpoint with the shape of `config` and normal weights, in bfloat16, with a tokenizer of numbers; in files of
    at most `file_bytes`, with an index, as published ones are."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    model, _ = load_model(folder, lazy=True, strict=False)
    shapes = [(name, value.shape) for name, value in nn.utils.tree_flatten(model.parameters())]
    scale = 0.02
    weights = {n: (mx.random.normal(s) * scale if len(s) > 1 else mx.ones(s)).astype(mx.bfloat16) for n, s in shapes}
    files = assign_shards([[TensorSpec(name, "BF16", shape)] for name, shape in shapes], file_bytes)
    for file, specs in files.items():
        mx.save_safetensors(str(folder / file), {spec.name: weights.pop(spec.name) for spec in specs}, {"format": "pt"})
    if len(files) > 1:
        (folder / INDEX).write_text(index_json(files))
    vocabulary = {str(i): i for i in range(config["vocab_size"])}
    Tokenizer(models.WordLevel(vocabulary, unk_token="0")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def mlx_lm_affine(path: Path, bits: int = 4) -> tuple[nn.Module, Any]:
    """What a user has today: mlx-lm's model, its linear layers and embeddings quantized as `mlx_lm.convert -q` does."""
    model, _ = load_model(path, lazy=True)
    if metal_kernels.device() == "cpu":
        model.set_dtype(mx.float32)
    nn.quantize(model, group_size=64, bits=bits)
    mx.eval(model.parameters())
    return model, load_tokenizer(path)


def speed_of_mlx_lm(model: nn.Module, tokenizer: Any, prompt: list[int], tokens: int) -> tuple[float, float]:
    """Prompt and generated tokens a second of mlx-lm's own generation."""
    last = list(stream_generate(model, tokenizer, prompt, max_tokens=tokens))[-1]
    return last.prompt_tps, last.generation_tps


def speed_of_ours(
    model: nn.Module, tokenizer: Any, prompt: list[int], tokens: int, cache: CacheConfig | None
) -> tuple[float, float]:
    """Prompt and generated tokens a second of this project's generation."""
    held = make_cache(model, cache)
    began = time.perf_counter()
    read_prompt(model, prompt[:-1], held)
    seconds = time.perf_counter() - began
    return rate(len(prompt) - 1, seconds), continue_prompt(model, tokenizer, prompt, held, tokens).tokens_per_s


def measure(name: str, path: Path, prompt_tokens: int, tokens: int, work: Path) -> list[dict[str, Any]]:
    """Rows of affine and TurboQuant, each the median of ROUNDS turns after one to warm up."""
    theirs = mlx_lm_affine(path)
    prompt = prompt_of(prompt_tokens)
    ours: dict[int, tuple[nn.Module, Any]] = {}
    for bits in (3, 4):
        convert(path, work / f"{name}-{bits}", config=QuantConfig(bits=bits))
        ours[bits] = load(work / f"{name}-{bits}")
    base = _median(lambda: speed_of_mlx_lm(*theirs, prompt, tokens))
    rows = [_row(name, prompt_tokens, "mlx-lm affine", 4, base, base, "mlx")]
    for method, bits, cache in VARIANTS:
        metal_kernels.reset_paths()
        speed = _median(lambda bits=bits, cache=cache: speed_of_ours(*ours[bits], prompt, tokens, cache))
        rows.append(_row(name, prompt_tokens, method, bits, speed, base, metal_kernels.kernel_path()))
    return rows


def _median(turn: Callable[[], tuple[float, float]]) -> tuple[float, float]:
    turns = [turn() for _ in range(ROUNDS + 1)][1:]
    return statistics.median(t[0] for t in turns), statistics.median(t[1] for t in turns)


def _row(
    name: str, prompt: int, method: str, bits: int, speed: tuple[float, float], base: tuple[float, float], path: str
) -> dict[str, Any]:
    return {"model": name, "method": method, "bits": bits, "prompt_tokens": prompt, "prompt_tokens_per_s": speed[0],
            "generation_tokens_per_s": speed[1], "prompt_times_affine": speed[0] / base[0],
            "generation_times_affine": speed[1] / base[1], "kernel_path": path}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=["small", "large"], default=["small", "large"])
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if "small" in args.models:
            trained = SHARED / "models" / "wiki-qwen2-29m"
            path = trained if trained.is_dir() else demo_model.path()
            rows += measure(path.name, path, 512, 100, work)
        if "large" in args.models:
            write_random_llama(work / "llama-378m-random", LARGE)
            rows += measure("llama-378m-random", work / "llama-378m-random", 256, 64, work)
    report("speed", command_of("end_to_end", **vars(args)), rows, seconds=time.perf_counter() - began)


if __name__ == "__main__":
    main()
