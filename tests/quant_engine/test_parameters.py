"""A checkpoint's tensors as the parameters of mlx-lm's model, known from headers and read when they are needed."""

import json
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from quant_engine.errors import CorruptCheckpointError, UnsupportedModelError
from quant_engine.parameters import Packing, Parameters
from quant_engine.safetensors_file import SIZES, TensorInfo, read_header
from quant_engine.source import resolve
from tests.quant_engine.checkpoints import CONFIG, random_weights, split, write_model

MIXTURE: dict[str, Any] = CONFIG | {
    "model_type": "qwen3_moe", "num_hidden_layers": 1, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 32,
    "moe_intermediate_size": 64, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
    "rope_theta": 1e4, "rope_scaling": None,
}  # fmt: skip
EXPERT = "model.layers.0.mlp.experts"


def mixture(folder: Path, change: Any = lambda made: made) -> Path:
    """A model of four experts, each a tensor of its own, as published."""

    def weights(made: dict[str, mx.array]) -> dict[str, mx.array]:
        dense = {name: array for name, array in made.items() if ".mlp." not in name and "layers.1" not in name}
        dense |= {f"model.layers.0.self_attn.{n}_norm.weight": mx.ones(32, mx.bfloat16) for n in "qk"}
        dense["model.layers.0.mlp.gate.weight"] = mx.random.normal((4, 128)).astype(mx.bfloat16)
        for e in range(4):
            for part, shape in {"gate_proj": (64, 128), "up_proj": (64, 128), "down_proj": (128, 64)}.items():
                dense[f"{EXPERT}.{e}.{part}.weight"] = mx.random.normal(shape).astype(mx.bfloat16)
        return change(dense)

    return write_model(folder, weights=weights, **MIXTURE)


def parameters(folder: Path) -> Parameters:
    source = resolve(folder)
    return Parameters(source.config, source.tensors)


def test_tensors_that_are_parameters_are_read_from_their_place(tmp_path: Path) -> None:
    found = parameters(write_model(tmp_path))
    name = "model.layers.0.mlp.up_proj.weight"
    stored = mx.load(str(tmp_path / "model.safetensors"))
    assert found[name].stored is not None
    assert mx.array_equal(found.rows(name, 3, 9), stored[name][3:9])
    assert not found.unused


def test_on_cuda_mlx_reads_the_tensors_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There, arrays that are handed over go through memory that moves page by page."""
    plain = parameters(write_model(tmp_path))
    monkeypatch.setattr("quant_engine.parameters.device", lambda: "cuda")
    found = parameters(tmp_path)
    for name in ("model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"):
        assert found.raw_rows(name, 3, 9) is None
        assert mx.array_equal(found.rows(name, 3, 9), plain._at_hand(plain[name]).rows(3, 9))


def test_on_cuda_a_thread_reads_a_tensor_when_its_first_rows_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, name = parameters(write_model(tmp_path)), "model.layers.0.mlp.up_proj.weight"
    monkeypatch.setattr("quant_engine.parameters.device", lambda: "cuda")
    found = parameters(tmp_path)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(found.raw_rows, name, 0, 9).result() is None
    monkeypatch.delattr(mx, "load")
    assert found.raw_rows(name, 9, 20) is None
    for first, last in ((0, 9), (9, 20)):
        assert mx.array_equal(found.rows(name, first, last), plain._at_hand(plain[name]).rows(first, last))


def test_on_cuda_values_that_are_no_numbers_are_found_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "model.layers.0.mlp.up_proj.weight"

    def broken(made: dict[str, mx.array]) -> dict[str, mx.array]:
        return made | {name: mx.where(mx.arange(made[name].shape[1]) == 5, mx.nan, made[name])}

    found = parameters(write_model(tmp_path, weights=broken))
    monkeypatch.setattr("quant_engine.parameters.device", lambda: "cuda")
    with pytest.raises(CorruptCheckpointError, match=f"{name} has NaN or infinite values"):
        found.rows(name, 0, 4)


def test_experts_are_stacked_when_they_are_read(tmp_path: Path) -> None:
    found = parameters(mixture(tmp_path))
    name = "model.layers.0.mlp.switch_mlp.down_proj.weight"
    assert (found[name].shape, found[name].matrix, found[name].stored) == ((4, 128, 64), (512, 64), None)
    stored = mx.load(str(tmp_path / "model.safetensors"))
    expected = mx.concatenate([stored[f"{EXPERT}.{e}.down_proj.weight"] for e in range(4)])
    assert mx.array_equal(found.rows(name, 100, 300), expected[100:300])
    assert mx.array_equal(found.rows(name, 0, 5), expected[:5])


def test_parameters_of_the_first_files_come_first_and_know_their_files(tmp_path: Path) -> None:
    found = parameters(split(mixture(tmp_path), 3))
    where = {name: {path.name for path in parameter.files} for name, parameter in found.items()}
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    experts = {index[f"{EXPERT}.{e}.up_proj.weight"] for e in range(4)}
    assert where["model.layers.0.mlp.switch_mlp.up_proj.weight"] == experts
    assert where["model.norm.weight"] == {index["model.norm.weight"]}
    assert len(experts) == 2, "or nothing is split"
    last = [max(files) for files in where.values()]
    assert last == sorted(last)


def test_a_parameter_is_computed_from_the_files_in_use_alone_wherever_they_are(tmp_path: Path) -> None:
    whole = parameters(mixture(tmp_path / "whole"))
    found = parameters(split(mixture(tmp_path / "split"), 3))
    for name, parameter in found.items():
        places = {path: path.rename(tmp_path / path.name) for path in parameter.files}
        found.use(places)
        rows = parameter.matrix[0]
        assert mx.array_equal(found.rows(name, 0, rows), whole.rows(name, 0, rows)), name
        for path, place in places.items():
            place.rename(path)


def test_all_bytes_are_counted_once(tmp_path: Path) -> None:
    source = resolve(mixture(tmp_path))
    found = Parameters(source.config, source.tensors)
    assert sum(p.nbytes for p in found.values()) == sum(info.nbytes for info in source.tensors.values())


def test_tensors_that_the_model_has_no_use_for_are_named(tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": mx.ones(16), "lm_head.weight": mx.zeros((96, 128))}
    found = parameters(write_model(tmp_path, weights=lambda made: made | extra, tie_word_embeddings=True))
    assert found.unused == set(extra)
    assert not found.unused & set(found)


@pytest.mark.parametrize("lost", ["up_proj", "down_proj"])
def test_a_missing_expert_is_named(tmp_path: Path, lost: str) -> None:
    name = f"{EXPERT}.2.{lost}.weight"
    folder = mixture(tmp_path, lambda made: {n: a for n, a in made.items() if n != name})
    with pytest.raises(CorruptCheckpointError, match=name):
        parameters(folder)


def test_experts_of_different_shapes_are_refused(tmp_path: Path) -> None:
    folder = mixture(tmp_path, lambda made: made | {f"{EXPERT}.1.up_proj.weight": mx.zeros((32, 128), mx.bfloat16)})
    with pytest.raises(CorruptCheckpointError, match="do not fit the model"):
        parameters(folder)


def test_values_that_are_not_finite_are_refused_where_they_are_computed_too(tmp_path: Path) -> None:
    bad = mx.full((128, 64), mx.nan, mx.bfloat16)
    found = parameters(mixture(tmp_path, lambda made: made | {f"{EXPERT}.1.down_proj.weight": bad}))
    with pytest.raises(CorruptCheckpointError, match=r"switch_mlp\.down_proj\.weight has NaN"):
        found.rows("model.layers.0.mlp.switch_mlp.down_proj.weight", 128, 256)


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_weights_that_mlx_quantized_are_dequantized(tmp_path: Path, mode: str) -> None:
    name = "model.layers.0.mlp.up_proj"
    group = 64 if mode == "affine" else 32

    def quantize(made: dict[str, mx.array]) -> dict[str, mx.array]:
        parts = mx.quantize(made.pop(f"{name}.weight"), group_size=group, bits=4, mode=mode)
        names = (f"{name}.{part}" for part in ("weight", "scales", "biases"))
        return made | dict(zip(names, parts, strict=False))

    found = parameters(
        write_model(tmp_path, weights=quantize, quantization={"bits": 4, "group_size": group, "mode": mode})
    )
    stored = mx.load(str(tmp_path / "model.safetensors"))
    parts = [stored[f"{name}.{part}"] for part in ("weight", "scales", "biases") if f"{name}.{part}" in stored]
    expected = mx.dequantize(*parts, group_size=group, bits=4, mode=mode)
    assert (found[f"{name}.weight"].shape, found[f"{name}.weight"].dtype) == ((256, 128), "BF16")
    assert mx.array_equal(found.rows(f"{name}.weight", 10, 20), expected[10:20])
    assert f"{name}.scales" not in found


def test_a_module_may_be_quantized_in_a_way_of_its_own() -> None:
    config = {"quantization": {"bits": 4, "group_size": 64, "model.a": {"bits": 8, "group_size": 32}, "model.b": False}}
    packing = Packing.of(config)
    assert packing is not None
    assert packing.for_module("model.a", config) == Packing(8, 32, "affine")
    assert packing.for_module("model.b", config) == packing.for_module("model.c", config) == Packing(4, 64, "affine")


DEEPSEEK: dict[str, Any] = {
    "model_type": "deepseek_v3", "vocab_size": 32, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "qk_nope_head_dim": 16, "first_k_dense_replace": 1,
    "quantization_config": {"quant_method": "fp8"},
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_float8_is_undone_where_mlx_lm_undoes_it(tmp_path: Path, dtype: str) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    codes = mx.to_fp8(mx.random.normal((160, 64)))
    scales = mx.array([[0.5], [3.0]])
    made = {name: codes, f"{name}_scale_inv": scales}
    mx.save_safetensors(str(tmp_path / "x.safetensors"), made)
    content = (tmp_path / "x.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    text = json.loads(content[8 : 8 + length])
    text[name]["dtype"] = dtype
    written = json.dumps(text).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(written)) + written + content[8 + length :])
    tensors = read_header(tmp_path / "x.safetensors")
    if dtype == "F8_E5M2":
        with pytest.raises(UnsupportedModelError, match=f"tensor {name} is F8_E5M2"):
            Parameters(DEEPSEEK, tensors)
        return
    expected = mx.from_fp8(codes, dtype=mx.bfloat16) * mx.repeat(scales, 128, axis=0)[:160]
    assert mx.array_equal(Parameters(DEEPSEEK, tensors).rows(name, 0, 160), expected.astype(mx.bfloat16))


def test_float8_that_mlx_lm_does_not_undo_is_refused_by_name() -> None:
    source = {name: ("BF16", array.shape) for name, array in random_weights(CONFIG).items()}
    name = "model.layers.0.mlp.up_proj.weight"
    source[name] = ("F8_E4M3", source[name][1])
    tensors = {n: TensorInfo(Path("x"), n, dtype, shape, 0, SIZES[dtype]) for n, (dtype, shape) in source.items()}
    with pytest.raises(UnsupportedModelError, match=rf"tensor {name} is F8_E4M3.*original model in float16"):
        Parameters(CONFIG | {"quantization_config": {"quant_method": "fp8"}}, tensors)
