"""Small made checkpoints, written by MLX's own safetensors writer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np

from quant_engine.safetensors_file import SafetensorsWriter, TensorSpec

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
LINEAR = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
          "mlp.up_proj", "mlp.down_proj")  # fmt: skip


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes as transformers writes them."""
    width, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    size = config.get("head_dim", width // config["num_attention_heads"])
    queries, keys = size * config["num_attention_heads"], size * config["num_key_value_heads"]
    outputs = dict(zip(LINEAR, (queries, keys, keys, width, inner, inner, width), strict=True))
    biased = LINEAR[:3] if config["model_type"] == "qwen2" else LINEAR[:4] if config.get("attention_bias") else ()
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, width),
        "model.norm.weight": (width,),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for path, out in outputs.items():
            read = {"mlp.down_proj": inner, "self_attn.o_proj": queries}.get(path, width)
            found[f"{layer}.{path}.weight"] = (out, read)
            if path in biased:
                found[f"{layer}.{path}.bias"] = (out,)
        if config["model_type"] == "qwen3":
            found[f"{layer}.self_attn.q_norm.weight"] = found[f"{layer}.self_attn.k_norm.weight"] = (size,)
        found[f"{layer}.input_layernorm.weight"] = found[f"{layer}.post_attention_layernorm.weight"] = (width,)
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (vocabulary, width)
    return found


def random_weights(config: dict[str, Any], dtype: mx.Dtype = mx.bfloat16) -> dict[str, mx.array]:
    """Gaussian weights of standard deviation 0.05, the same each time."""
    mx.random.seed(11)
    return {name: (mx.random.normal(shape) * 0.05).astype(dtype) for name, shape in shapes(config).items()}


def write_model(
    folder: Path,
    *,
    weights: Callable[[dict[str, mx.array]], dict[str, mx.array]] = lambda made: made,
    dtype: mx.Dtype = mx.bfloat16,
    shards: int = 1,
    **settings: Any,
) -> Path:
    """A model folder with CONFIG and `settings`; `weights` may change its tensors before they are written."""
    config = CONFIG | settings
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"eos_token_id": 0}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage:\n- en\n---\n\n# Made\n")
    tensors = weights(random_weights(config, dtype))
    if shards == 1:
        mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "pt"})
        return folder
    names = list(tensors)
    where = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(where.values())):
        mx.save_safetensors(str(folder / file), {name: tensors[name] for name in names if where[name] == file})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def split(folder: Path, count: int) -> Path:
    """Split a model's weights anew as published checkpoints are: tensors in the order of their names, layer after
    layer, in files of about equal size, wherever that cuts."""
    before_files = sorted(folder.glob("*.safetensors"))
    tensors = {n: a for file in before_files for n, a in cast(dict[str, mx.array], mx.load(str(file))).items()}
    mx.eval(tensors)
    for file in before_files:
        file.unlink()
    names = sorted(tensors, key=lambda name: [int(part) if part.isdigit() else -1 for part in name.split(".")])
    total, before = sum(array.nbytes for array in tensors.values()), 0
    where: dict[str, str] = {}
    for name in names:
        where[name] = f"model-{count * before // total + 1:05d}-of-{count:05d}.safetensors"
        before += tensors[name].nbytes
    for file in sorted(set(where.values())):
        mx.save_safetensors(str(folder / file), {name: tensors[name] for name in names if where[name] == file})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def write_large_model(folder: Path) -> int:
    """A checkpoint of more than 500 MB, one random block repeated, streamed to the disk; its largest layer in bytes."""
    config = CONFIG | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 2, "vocab_size": 32_768,
                       "num_attention_heads": 16, "num_key_value_heads": 16}  # fmt: skip
    write_model(folder, weights=lambda made: {"none": mx.zeros(1)})
    (folder / "config.json").write_text(json.dumps(config))
    largest = _stream(folder / "model.safetensors", config)
    assert (folder / "model.safetensors").stat().st_size > 500_000_000
    return largest


def _stream(path: Path, config: dict[str, Any]) -> int:
    specs = [TensorSpec(name, "BF16", shape) for name, shape in shapes(config).items()]
    block = np.random.default_rng(0).standard_normal(2**21).astype(np.float32) * 0.02
    words = (block.view(np.uint32) >> 16).astype(np.uint16)
    path.unlink()
    with SafetensorsWriter(path, specs) as writer:
        for spec in specs:
            left = spec.nbytes // 2
            while left:
                writer.write(spec.name, words[: min(left, words.size)])
                left -= min(left, words.size)
    return max(spec.nbytes for spec in specs)
