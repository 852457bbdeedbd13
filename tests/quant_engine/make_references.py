"""Write `references/`: outlines of small checkpoints as transformers saves them, and the logits it computes.

    python -m tests.quant_engine.make_references [NAME ...]

Needs torch and transformers. Run it for an architecture that is added; the tests only read what it wrote.
"""

import json
import sys
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
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32,
    "head_dim": 32, "moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
}  # fmt: skip
"""DeepSeek's attention and experts."""
TWO_ROTATIONS = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
}
SMALL_VISION = {
    "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
}  # fmt: skip
TIED = {"tie_word_embeddings": True}
FUSED = ("qwen3_5_moe",)
"""Published with the experts of a layer in one tensor, where transformers' own `save_pretrained` writes each alone."""

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
    "qwen3_5_moe_split": (
        "Qwen3_5MoeForConditionalGeneration",
        {
            "text_config": SMALL | HYBRID | MIXTURE | {"shared_expert_intermediate_size": 32},
            "vision_config": VISION, "tie_word_embeddings": False,
        },
    ),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        SMALL | HYBRID | MIXTURE | {"shared_expert_intermediate_size": 32, "decoder_sparse_step": 1},
    ),
    "glm4": ("Glm4ForCausalLM", SMALL),
    "glm4_moe": (
        "Glm4MoeForCausalLM",
        SMALL | {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1,
                 "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1}
    ),
    "gemma2": ("Gemma2ForCausalLM", SMALL | TIED | {"query_pre_attn_scalar": 32}),
    "gemma3_text": (
        "Gemma3ForCausalLM",
        SMALL | TIED | {"num_hidden_layers": 6, "sliding_window": 8, "query_pre_attn_scalar": 32,
                        "rope_parameters": TWO_ROTATIONS},
    ),
    "phi3": ("Phi3ForCausalLM", SMALL | NARROW | {"sliding_window": None}),
    "olmo2": ("Olmo2ForCausalLM", SMALL | NARROW),
    "olmoe": ("OlmoeForCausalLM", SMALL | NARROW | MIXTURE),
    "starcoder2": ("Starcoder2ForCausalLM", SMALL | NARROW | {"sliding_window": None}),
    "mixtral": (
        "MixtralForCausalLM",
        SMALL | NARROW | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "granite": (
        "GraniteForCausalLM",
        SMALL | NARROW | {"embedding_multiplier": 12.0, "attention_multiplier": 0.1, "residual_multiplier": 0.22,
                          "logits_scaling": 8.0},
    ),
    "cohere2": ("Cohere2ForCausalLM", SMALL | NARROW | TIED | {"sliding_window": 8, "sliding_window_pattern": 2}),
    "smollm3": ("SmolLM3ForCausalLM", SMALL | NARROW | {"num_hidden_layers": 4}),
    "lfm2": (
        "Lfm2ForCausalLM",
        SMALL | NARROW | TIED | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    "deepseek_v3": ("DeepseekV3ForCausalLM", SMALL | LATENT | {"q_lora_rank": 32, "routed_scaling_factor": 2.5}),
    "llama4": (
        "Llama4ForConditionalGeneration",
        {
            "text_config": SMALL
            | {"num_hidden_layers": 4, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 96,
               "interleave_moe_layer_step": 2, "attention_chunk_size": 8, "no_rope_layers": [1, 1, 1, 0]},
            "vision_config": SMALL_VISION,
        },
    ),
}  # fmt: skip


def write_outline(name: str, folder: Path) -> None:
    """Save an untrained model with transformers and note what it wrote."""
    class_name, settings = ARCHITECTURES[name]
    kind = getattr(transformers, class_name)
    model = kind(kind.config_class(**settings)).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="300KB", save_original_format=name not in FUSED)
    config = json.loads((folder / "config.json").read_text())
    files: dict[str, dict[str, tuple[str, list[int]]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        files[path.name] = {n: ("BF16", list(tensors[n].shape)) for n in sorted(tensors)}
    if name == "gpt_oss":
        files, config = _as_mxfp4(files), config | {"quantization_config": _MXFP4}
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
    if name == "llama4":
        model = model.language_model  # the whole cannot be called without an image
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].float().numpy()


def main() -> None:
    for name in sys.argv[1:] or ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            write_outline(name, Path(folder))
        with tempfile.TemporaryDirectory() as folder:
            logits = logits_of(write_published(name, Path(folder)), name)
        np.save(REFERENCES / f"{name}.npy", logits)
        print(f"{name}: {sum(map(len, outline(name)['files'].values()))} tensors, logits {logits.std():.3f}")


if __name__ == "__main__":
    main()
