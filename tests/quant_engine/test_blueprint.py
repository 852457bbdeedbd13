from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from quant_engine.blueprint import Blueprint, draw
from quant_engine.config import QuantConfig
from quant_engine.errors import RecipeError, UnsupportedModelError
from quant_engine.parameters import Parameters
from quant_engine.source import resolve
from tests.quant_engine.checkpoints import write_model


def _draw(folder: Path, recipe: QuantConfig | None = None, **options: Any) -> Blueprint:
    source = resolve(folder)
    return draw(source.config, Parameters(source.config, source.tensors), recipe or QuantConfig(), **options)


def test_linear_layers_are_quantized_and_the_rest_is_kept_with_its_reason(tmp_path: Path) -> None:
    drawn = _draw(write_model(tmp_path, model_type="qwen2"))
    assert len(drawn.modules) == 14
    assert drawn.modules["model.layers.0.mlp.down_proj"].shape == (128, 256)
    assert drawn.excluded["lm_head"] == "output projection"
    assert drawn.excluded["model.embed_tokens"] == "embeddings"
    assert drawn.excluded["model.norm"] == "norm"
    assert len(drawn.excluded) == 7
    assert drawn.kept["model.layers.0.self_attn.q_proj.bias"].dtype == "BF16"


@pytest.mark.parametrize(("bits", "expected"), [(2, 2.25), (3, 3.25), (4, 4.25)])
def test_bits_a_weight_count_codes_and_scales(tmp_path: Path, bits: int, expected: float) -> None:
    assert _draw(write_model(tmp_path), QuantConfig(bits=bits)).bits_per_weight == expected


def test_qjl_is_counted_in_full(tmp_path: Path) -> None:
    drawn = _draw(write_model(tmp_path), QuantConfig(use_qjl=True))
    weights = drawn.quantized_parameters
    rows = sum(entry.shape[0] for entry in drawn.modules.values())
    assert drawn.bits_per_weight == pytest.approx(3 + 16 / 64 + 1 + 16 * rows / weights, abs=1e-12)


def test_parameters_are_those_of_the_model_even_where_it_ties_its_head(tmp_path: Path) -> None:
    tied = _draw(write_model(tmp_path / "tied", tie_word_embeddings=True))
    untied = _draw(write_model(tmp_path / "untied"))
    assert untied.parameters - tied.parameters == 96 * 128


def test_a_tied_head_that_is_stored_is_not_copied(tmp_path: Path) -> None:
    head = {"lm_head.weight": mx.zeros((96, 128))}
    drawn = _draw(write_model(tmp_path, weights=lambda made: made | head, tie_word_embeddings=True))
    assert drawn.excluded["lm_head"] == "not used by the model, not copied"
    assert "lm_head.weight" not in drawn.kept


def test_a_dtype_is_given_to_kept_floats(tmp_path: Path) -> None:
    drawn = _draw(write_model(tmp_path), dtype="float32")
    assert {spec.dtype for spec in drawn.kept.values()} == {"F32"}
    with pytest.raises(RecipeError, match="dtype 'int8'; choose one of float32, float16, bfloat16"):
        _draw(tmp_path, dtype="int8")


def test_widths_that_do_not_fit_are_refused_or_kept(tmp_path: Path) -> None:
    write_model(tmp_path, intermediate_size=172)
    with pytest.raises(RecipeError, match=r"model\.layers\.\d\.mlp\.down_proj: a width of 172"):
        _draw(tmp_path)
    drawn = _draw(tmp_path, keep_unfitting=True)
    assert len(drawn.modules) == 12
    assert "172" in drawn.excluded["model.layers.1.mlp.down_proj"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantized already \(gptq\)"),
        ({"quantization_config": {"quant_method": "awq"}}, r"\(awq\)"),
        ({"quantization": "nvfp4"}, r"\(nvfp4\)"),
    ],
)
def test_models_that_are_quantized_already_are_refused_by_method(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        _draw(write_model(tmp_path, **settings))


def test_weights_in_dtypes_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    write_model(tmp_path, weights=lambda made: made | {name: mx.zeros((256, 128), dtype=mx.uint8)})
    with pytest.raises(UnsupportedModelError, match=rf"tensor {name} is U8"):
        _draw(tmp_path)


def test_qjl_is_for_products_and_not_for_embeddings(tmp_path: Path) -> None:
    drawn = _draw(write_model(tmp_path), QuantConfig(use_qjl=True, embed_bits=4))
    assert not drawn.modules["model.embed_tokens"].qjl
    assert drawn.modules["model.layers.0.mlp.up_proj"].qjl


def test_matrices_of_a_few_rows_stay_whole(tmp_path: Path) -> None:
    drawn = _draw(write_model(tmp_path, num_attention_heads=16, num_key_value_heads=1, head_dim=8))
    assert drawn.excluded["model.layers.0.self_attn.k_proj"] == "fewer than 16 rows or columns"
