import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

import metal_kernels
from quant_engine import mlx_lm_adapter as adapter
from quant_engine.config import QuantConfig
from quant_engine.convert import convert
from quant_engine.errors import CorruptCheckpointError, RecipeError, SourceError, TurboQuantError
from quant_engine.linear import TurboQuantLinear
from quant_engine.loader import file_dtype, load, load_source
from quant_engine.quantizer import dequantize_weight, quantize_weight
from quant_engine.shared_input import Branch
from quant_engine.source import resolve

TOKENS = mx.array([[5, 300, 17, 1200, 44, 44, 9, 800]])


@pytest.fixture(scope="module")
def converted(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("converted") / "demo-3bit"
    convert(demo_model, output, config=QuantConfig(bits=3))
    return output


def _mlx_lm_float32(path: Path) -> nn.Module:
    model, _ = load_model(path)
    model.set_dtype(mx.float32)
    return model


def test_a_float_model_computes_what_mlx_lm_does(demo_model: Path) -> None:
    model, tokenizer = load(demo_model)
    assert mx.allclose(model(TOKENS), _mlx_lm_float32(demo_model)(TOKENS), atol=2e-4)
    assert tokenizer.decode(tokenizer.encode("Once upon a time")) == "Once upon a time"


@pytest.mark.parametrize("fuse", [True, False])
def test_a_converted_model_computes_with_the_dequantized_weights(demo_model: Path, converted: Path, fuse: bool) -> None:
    expected = _mlx_lm_float32(demo_model)
    for path, layer in adapter.linear_modules(expected).items():
        layer.weight = dequantize_weight(quantize_weight(layer.weight, QuantConfig(bits=3)))
        assert path.split(".")[-1].endswith("_proj")
    model, _ = load(converted, fuse=fuse)
    assert np.abs(np.array(model(TOKENS)) - np.array(expected(TOKENS))).max() < 1e-3
    kinds = adapter.linear_modules(model, (TurboQuantLinear, Branch))
    assert len(kinds) == (4 * 4 if fuse else 4 * 7)  # fused feed-forward layers stand for three
    assert any(isinstance(layer, Branch) for layer in kinds.values()) == fuse


def test_the_path_that_ran_is_the_packed_one(converted: Path) -> None:
    model, _ = load(converted)
    metal_kernels.reset_paths()
    mx.eval(model(TOKENS))
    assert "matmul" in metal_kernels.kernel_path()
    assert "reference" not in metal_kernels.kernel_path()


def test_activations_are_float32_on_a_cpu_unless_asked_otherwise(converted: Path) -> None:
    assert load(converted)[0](TOKENS).dtype == mx.float32
    assert load(converted, dtype="bfloat16")[0](TOKENS).dtype == mx.bfloat16
    with pytest.raises(RecipeError, match="dtype 'int8'; choose from float32, float16, bfloat16"):
        load(converted, dtype="int8")


def test_a_qjl_model_loads_with_its_signs(demo_model: Path, tmp_path: Path) -> None:
    convert(demo_model, tmp_path / "qjl", config=QuantConfig(bits=2, use_qjl=True))
    plain, _ = load(demo_model)
    model, _ = load(tmp_path / "qjl")
    convert(demo_model, tmp_path / "without", config=QuantConfig(bits=2))
    without, _ = load(tmp_path / "without")
    exact = plain(TOKENS)
    assert mx.square(model(TOKENS) - exact).mean() != mx.square(without(TOKENS) - exact).mean()


def test_mlx_lms_own_affine_models_load(demo_model: Path, tmp_path: Path) -> None:
    model = _mlx_lm_float32(demo_model)
    nn.quantize(model, group_size=64, bits=4)
    folder = tmp_path / "affine"
    shutil.copytree(demo_model, folder)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(nn.utils.tree_flatten(model.parameters())))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization": {"group_size": 64, "bits": 4}}))
    loaded, _ = load(folder)
    assert mx.allclose(loaded(TOKENS), model(TOKENS), atol=2e-3)


def test_a_model_that_lost_a_tensor_is_refused(converted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(converted, folder)
    tensors = mx.load(str(folder / "model.safetensors"))
    del tensors["model.layers.2.mlp.down_proj.scales"]
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    with pytest.raises(TurboQuantError, match=r"model\.layers\.2\.mlp\.down_proj"):
        load(folder)


def test_a_missing_or_truncated_model_is_refused(converted: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no model at"):
        load(tmp_path / "nowhere")
    folder = tmp_path / "short"
    shutil.copytree(converted, folder)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(CorruptCheckpointError):
        load(folder)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"torch_dtype": "float16"}, mx.float16),
        ({"dtype": "float32", "torch_dtype": "float16"}, mx.float32),
        ({"text_config": {"dtype": "float16"}}, mx.float16),
        ({}, mx.bfloat16),
    ],
)
def test_the_dtype_of_activations_is_that_of_the_file(config: dict[str, Any], dtype: mx.Dtype) -> None:
    assert file_dtype(config) == dtype


def test_norms_take_the_precision_of_activations(demo_model: Path) -> None:
    model = adapter.load_float(demo_model, resolve(demo_model).config)
    adapter.match_norms(model, mx.float16)
    norms = adapter.linear_modules(model, (nn.RMSNorm,)).values()
    assert norms
    assert {norm["weight"].dtype for norm in norms} == {mx.float16}


def test_a_config_that_mlx_lm_cannot_use_is_explained(demo_model: Path, tmp_path: Path) -> None:
    shutil.copytree(demo_model, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    for change, message in (
        ({"num_hidden_layers": "two"}, "does not describe a .* model as mlx-lm has it: .*; download it again, or"),
        ({"num_hidden_layers": 1}, "does not describe a .* model as mlx-lm has it: .*parameters not in model"),
        ({"model_type": "nonsense"}, "model_type 'nonsense' is none that mlx-lm has a model for"),
    ):
        file.write_text(json.dumps(config | change))
        with pytest.raises(TurboQuantError, match=message):
            load(tmp_path / "model")


SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "rms_norm_eps": 1e-5, "max_position_embeddings": 256,
    "rope_theta": 10000.0, "head_dim": 32, "tie_word_embeddings": True,
}  # fmt: skip
GEMMA3N: dict[str, Any] = {
    **SMALL, "model_type": "gemma3n_text", "hidden_size": 128, "num_hidden_layers": 4, "num_kv_shared_layers": 2,
    "laurel_rank": 32,
    "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 32, "sliding_window": 8, "num_kv_heads": 2,
    "rope_local_base_freq": 1e4, "final_logit_softcapping": 30.0, "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
    "layer_types": ["sliding_attention", "full_attention"] * 2, "altup_num_inputs": 4, "altup_coef_clip": 0.1,
    "altup_correct_scale": True, "altup_active_idx": 0,
}  # fmt: skip
READING: dict[str, dict[str, Any]] = {
    "seed_oss": SMALL,
    "llama4_text": SMALL | {"intermediate_size_mlp": 128, "no_rope_layers": [1, 0], "use_qk_norm": True},
    "gemma3n": {"text_config": GEMMA3N},
    "afm7": {"vocab_size": 96, "hidden_dim": 64, "num_layers": 4, "num_kv_reuse_layers": 2, "num_heads": 4,
             "num_kv_heads": 2, "hidden_dim_scale_factor": 2.0},
}  # fmt: skip


@pytest.mark.parametrize("model_type", READING)
def test_models_that_read_their_layers_weights_run(model_type: str, tmp_path: Path) -> None:
    """Some multiply by a weight themselves, change it, or have linear layers of a kind of their own."""
    config = {"model_type": model_type, "torch_dtype": "float32"} | READING[model_type]
    mx.random.seed(0)
    expected = adapter.build(config)
    weights = {name: (mx.random.normal(array.shape) * 0.1) for name, array in tree_flatten(expected.parameters())}
    expected.load_weights(list(weights.items()))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    model, tokens = load_source(resolve(tmp_path)), mx.array([[1, 5, 9, 3, 7]])
    assert mx.allclose(model(tokens), expected(tokens), rtol=1e-3, atol=1e-4)
    convert(tmp_path, tmp_path / "4bit", config=QuantConfig(bits=4, group_size=32), dtype="bfloat16")
    assert mx.isfinite(load_source(resolve(tmp_path / "4bit"))(tokens)).all()
