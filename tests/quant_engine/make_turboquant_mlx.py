"""Write `references/turboquant_mlx/`: a small model that turboquant-mlx wrote, and the logits it computes.

    python -m tests.quant_engine.make_turboquant_mlx

Needs turboquant-mlx-full 0.30.0 beside mlx-lm, of which the parts that run without Metal are used. The tests only read
what it wrote. One model has every kind of layer: 4-bit attention, a dense layer of 3 bits and a mixture whose experts
are ternary but for 2 bits down, QJL on all but experts, and an embedding that MLX quantized.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import save_config, save_model
from turboquant_mlx.config import TurboQuantConfig
from turboquant_mlx.core.polar_quantize import polar_dequantize_weight
from turboquant_mlx.generate import _prepare_affine_extras, _prepare_polar_layers
from turboquant_mlx.layers import polar_linear, polar_switch_linear
from turboquant_mlx.quantize_model import quantize_affine_extras, turboquant_quantize

from quant_engine import mlx_lm_adapter as adapter
from tests.quant_engine.published import REFERENCES, TOKENS, array

FOLDER = REFERENCES / "turboquant_mlx"
CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "eos_token_id": 0, "rope_theta": 10000.0, "num_experts": 8,
    "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True, "decoder_sparse_step": 1,
    "mlp_only_layers": [0], "dtype": "bfloat16",
}  # fmt: skip
RECIPE = TurboQuantConfig(
    bits=3, group_size=32, use_qjl=True, attn_bits=4, ternary_experts=True, expert_down_bits=2
)  # fmt: skip


def write() -> None:
    """Quantize a model of made-up weights and save it, as that program's `convert` does."""
    model = adapter.build(CONFIG)
    weights = {name: array(name, "BF16", blank.shape) for name, blank in tree_flatten(model.parameters())}
    adapter.set_parameters(model, weights)
    model, config = turboquant_quantize(model, dict(CONFIG), RECIPE)
    quantize_affine_extras(model, config, bits=4, group_size=32)
    shutil.rmtree(FOLDER, ignore_errors=True)
    save_model(FOLDER, model)
    save_config(config, FOLDER / "config.json")


def logits() -> np.ndarray:
    """What it computes for TOKENS on float32 activations, by its own operations that need no Metal."""
    polar_linear._QMM_MAX_TOKENS = polar_linear._QMV_MAX_ROWS = polar_switch_linear._GATHER_MM_MIN_ROUTINGS = 0
    polar_switch_linear.polar_dequant_experts = _dequantized_experts
    config = json.loads((FOLDER / "config.json").read_text())
    weights = mx.load(str(FOLDER / "model.safetensors"))
    model = adapter.build(config)
    _prepare_polar_layers(model, weights, TurboQuantConfig.from_dict(config["quantization"]))
    _prepare_affine_extras(model, weights)
    model.load_weights(list(weights.items()))
    model.set_dtype(mx.float32, lambda dtype: dtype == mx.bfloat16)
    return np.array(model(mx.array([TOKENS]))[0].astype(mx.float32))


def _dequantized_experts(words, scales, codebook, bits, group_size, trit=False):
    width = scales.shape[-1] * group_size
    experts = zip(words, scales, strict=True)
    return mx.stack([polar_dequantize_weight(w, s, codebook, bits, group_size, width, trit) for w, s in experts])


if __name__ == "__main__":
    write()
    np.save(FOLDER / "logits.npy", logits())
    print(*(f"{path.name}: {path.stat().st_size} bytes" for path in sorted(Path(FOLDER).iterdir())), sep="\n")
