"""Write `references/`: outlines of small checkpoints as transformers saves them, and the logits it computes.

    python -m tests.quant_engine.make_references

Needs torch and transformers. Run it when an architecture is added; the tests only read what it wrote.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.quant_engine.published import REFERENCES, TOKENS, outline, write_published

SMALL: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
NARROW = {"num_attention_heads": 2, "num_key_value_heads": 1}
"""Heads that make up the hidden size, as these architectures have them."""
MIXTURE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
HYBRID = {
    "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32,
    "linear_value_head_dim": 32, "linear_conv_kernel_dim": 4, "full_attention_interval": 4,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}  # fmt: skip
VISION = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 16,
}  # fmt: skip

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", SMALL),
    "qwen2": ("Qwen2ForCausalLM", SMALL | NARROW | {"tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", SMALL | {"sliding_window": None}),
    "qwen3": ("Qwen3ForCausalLM", SMALL),
    "qwen3_5": (
        "Qwen3_5ForConditionalGeneration",
        {"text_config": SMALL | HYBRID, "vision_config": VISION, "tie_word_embeddings": False},
    ),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM", SMALL | NARROW | MIXTURE
        | {"shared_expert_intermediate_size": 64, "decoder_sparse_step": 1, "norm_topk_prob": False}
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", SMALL | MIXTURE | {"decoder_sparse_step": 1}),
    "gpt_oss": (
        "GptOssForCausalLM",
        SMALL | {"hidden_size": 288, "intermediate_size": 288, "num_local_experts": 4, "num_experts_per_tok": 2,
                 "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "qwen3_5_moe": (
        "Qwen3_5MoeForConditionalGeneration",
        {
            "text_config": SMALL | HYBRID | MIXTURE | {"num_experts": 256, "shared_expert_intermediate_size": 32},
            "vision_config": VISION, "tie_word_embeddings": False,
        },
    ),
}  # fmt: skip


def write_outline(name: str, folder: Path) -> None:
    """Save an untrained model with transformers and note what it wrote."""
    class_name, settings = ARCHITECTURES[name]
    kind = getattr(transformers, class_name)
    model = kind(kind.config_class(**settings)).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="300KB")
    config = json.loads((folder / "config.json").read_text())
    files: dict[str, dict[str, tuple[str, list[int]]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        files[path.name] = {n: ("BF16", list(tensors[n].shape)) for n in sorted(tensors)}
    if name == "gpt_oss":
        files, config = _as_mxfp4(files), config | {"quantization_config": _MXFP4}
    if name == "qwen3_5_moe":
        files = _fused(files)
    REFERENCES.mkdir(exist_ok=True)
    (REFERENCES / f"{name}.json").write_text(json.dumps({"config": config, "files": files}) + "\n")


_MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


def _as_mxfp4(files: dict[str, Any]) -> dict[str, Any]:
    """Experts as the published model has them: two 4-bit floats a byte, (experts, out, in / 32, 16), and exponents."""
    made: dict[str, Any] = {}
    for file, tensors in files.items():
        made[file] = {}
        for name, (dtype, shape) in tensors.items():
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                experts, width, out = shape
                made[file][f"{name}_blocks"] = ("U8", [experts, out, width // 32, 16])
                made[file][f"{name}_scales"] = ("U8", [experts, out, width // 32])
            else:
                made[file][name] = (dtype, shape)
    return made


def _fused(files: dict[str, Any]) -> dict[str, Any]:
    """Experts as the published model has them: one tensor (experts, 2 * inner, width), one (experts, width, inner)."""
    made: dict[str, Any] = {}
    for file, tensors in files.items():
        made[file] = {}
        for name, (dtype, (out, width, *_)) in ((n, (d, (*s, 0, 0))) for n, (d, s) in tensors.items()):
            layer, split, rest = name.partition(".mlp.experts.")
            expert, _, part = rest.partition(".")
            if not split:
                made[file][name] = tensors[name]
            elif expert == "0" and part == "gate_proj.weight":
                made[file][f"{layer}.mlp.experts.gate_up_proj"] = (dtype, [256, 2 * out, width])
            elif expert == "0" and part == "down_proj.weight":
                made[file][f"{layer}.mlp.experts.down_proj"] = (dtype, [256, out, width])
    return made


def _dequantized(folder: Path) -> None:
    """Put floats in the place of MXFP4: a table of 16 values times a power of two, as OCP's MX specification says."""
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    table = np.concatenate([table, -table])
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in [n for n in tensors if n.endswith("_blocks")]:
            packed, scales = tensors.pop(name).numpy(), tensors.pop(name.replace("_blocks", "_scales")).numpy()
            pairs = np.stack([table[packed & 15], table[packed >> 4]], axis=-1).reshape(*packed.shape[:-1], 32)
            weight = pairs * np.exp2(scales.astype(np.float32) - 127)[..., None]
            flat = weight.reshape(*packed.shape[:2], -1).swapaxes(1, 2)
            tensors[name.removesuffix("_blocks")] = torch.from_numpy(np.ascontiguousarray(flat)).to(torch.bfloat16)
        save_file(tensors, path, {"format": "pt"})
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    weight_map = {n: p.name for p in folder.glob("*.safetensors") for n in load_file(p)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def logits_of(folder: Path, name: str) -> np.ndarray:
    """transformers' logits for TOKENS in float32."""
    kind = getattr(transformers, ARCHITECTURES[name][0])
    options = {"attn_implementation": "eager"} if name == "gpt_oss" else {}
    if name == "gpt_oss":
        _dequantized(folder)
    model = kind.from_pretrained(folder, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].float().numpy()


def main() -> None:
    for name in ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            write_outline(name, Path(folder))
        with tempfile.TemporaryDirectory() as folder:
            logits = logits_of(write_published(name, Path(folder)), name)
        np.save(REFERENCES / f"{name}.npy", logits)
        print(f"{name}: {sum(map(len, outline(name)['files'].values()))} tensors, logits {logits.std():.3f}")


if __name__ == "__main__":
    main()
