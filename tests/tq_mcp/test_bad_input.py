"""Checkpoints that cannot be converted: each is refused in words that name what is wrong, and leaves nothing."""

import json
import os
import struct
from collections.abc import Callable, Generator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from quant_engine.config import QuantConfig
from quant_engine.convert import convert
from tests.quant_engine.checkpoints import write_model
from tests.quant_engine.published import write_published
from tests.quant_engine.test_parameters import EXPERT, mixture
from tq_mcp.errors import EXPECTED
from tq_mcp.services import Services, open_services
from tq_mcp.settings import Settings

UP = "model.layers.1.mlp.up_proj.weight"
AGAIN = "download the model again, whole"
INDEX = "model.safetensors.index.json"

Weights = dict[str, mx.array]
Make = Callable[[Path], Any]


def settings(folder: Path, **changes: Any) -> None:
    """Change a folder's config.json; None takes a setting out."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def model(change: Callable[[Weights], Weights] = lambda made: made, **config: Any) -> Make:
    """Make a model with changed tensors, whose config.json says something else afterwards."""

    def make(folder: Path) -> None:
        write_model(folder, weights=change)
        settings(folder, **config)

    return make


def without(*names: str) -> Callable[[Weights], Weights]:
    return lambda made: {name: array for name, array in made.items() if name not in names}


def having(**arrays: mx.array) -> Callable[[Weights], Weights]:
    """Tensors by name, with "/" for "."."""
    return lambda made: made | {name.replace("/", "."): array for name, array in arrays.items()}


def with_value(name: str, value: float) -> Callable[[Weights], Weights]:
    def change(made: Weights) -> Weights:
        flat = np.array(made[name].astype(mx.float32)).reshape(-1)
        flat[7] = value
        return made | {name: mx.array(flat).reshape(made[name].shape).astype(mx.bfloat16)}

    return change


def shards(change_index: Callable[[dict[str, str]], None] = lambda _: None, lost: int = 0) -> Make:
    """Make a model in two files, of which one may get lost, with a changed index."""

    def make(folder: Path) -> None:
        write_model(folder, shards=2)
        index = json.loads((folder / INDEX).read_text())
        change_index(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))
        if lost:
            (folder / f"model-{lost:05d}-of-00002.safetensors").unlink()

    return make


def move(where: dict[str, str]) -> None:
    where[UP] = next(file for file in where.values() if file != where[UP])


def invent(where: dict[str, str]) -> None:
    where["invented"] = where[UP]


def beside(name: str, **arrays: mx.array) -> Make:
    """Make a model with another file beside its own."""

    def make(folder: Path) -> None:
        write_model(folder)
        mx.save_safetensors(str(folder / name), arrays or {UP: mx.zeros((256, 128), mx.bfloat16)})

    return make


def weights_file(content: bytes) -> Make:
    def make(folder: Path) -> None:
        (write_model(folder) / "model.safetensors").write_bytes(content)

    return make


def header(text: str, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text.encode() + data


def files(*names: str) -> Make:
    """Make a folder of empty files."""

    def make(folder: Path) -> None:
        folder.mkdir()
        for name in names:
            (folder / name).write_text("{}")

    return make


def float8(folder: Path, **config: Any) -> None:
    """A model whose layers are 8-bit floats with a scale each, as transformers publishes them."""

    def change(made: Weights) -> Weights:
        layers = {name: array for name, array in made.items() if "proj" in name}
        packed = {name: mx.to_fp8(array) for name, array in layers.items()}
        return made | packed | {f"{name}_scale_inv": mx.array(0.5) for name in layers}

    write_model(folder, weights=change, quantization_config={"quant_method": "fp8"}, **config)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    text = content[8 : 8 + length].decode().replace('"U8"', '"F8_E4M3"')
    path.write_bytes(header(text, content[8 + length :]))


def packed(mode: str, bits: int, group_size: int) -> Make:
    """Make a model with a layer that MLX quantized."""

    def change(made: Weights) -> Weights:
        parts = mx.quantize(made.pop(UP), group_size=group_size, bits=bits, mode=mode)
        names = (UP.replace("weight", part) for part in ("weight", "scales", "biases"))
        return made | dict(zip(names, parts, strict=False))

    return model(change, quantization={"bits": bits, "group_size": group_size, "mode": mode})


def published(name: str, **config: Any) -> Make:
    def make(folder: Path) -> None:
        write_published(name, folder)
        settings(folder, **config)

    return make


def experts(change: Callable[[Weights], Weights] = lambda made: made, **config: Any) -> Make:
    def make(folder: Path) -> None:
        settings(mixture(folder, change), **config)

    return make


def method(name: str, **more: Any) -> Make:
    return model(quantization_config={"quant_method": name, **more})


ROPE = {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 256}
UNDONE = r"in a way that is not undone here; give the original model in float16, bfloat16 or float32, or one quantized"
LORA = {"base_model/model/model/layers/0/self_attn/q_proj/lora_A/weight": mx.ones((8, 128))}
TWICE = '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}'

CASES: Mapping[str, tuple[Make, str]] = {
    # files and index
    "shard missing": (shards(lost=2), rf"{INDEX} lists model-00002-of-00002\.safetensors, which is missing"),
    "tensor in another shard": (shards(move), rf"{INDEX} says that tensor {UP} is in model-\S+, and it is not"),
    "tensor in no shard": (shards(invent), rf"{INDEX} says that tensor invented is in model-\S+, and it is not"),
    "file of no bytes": (weights_file(b""), r"model\.safetensors is damaged: its 0 bytes cannot hold a header"),
    "file of no tensors": (weights_file(header("{}")), rf"21 tensors are missing, the first lm_head\.weight; {AGAIN}"),
    "name twice in a file": (weights_file(header(TWICE, b"ab")), "its header names 'a' twice; download it again"),
    "name in two files": (beside("model-2.safetensors"), rf"tensor {UP} is in model-2\.safetensors and in model\."),
    # tensors and config
    "tensor missing": (model(without(UP)), f"1 tensors are missing, the first {UP}; {AGAIN}"),
    "head missing": (model(without("lm_head.weight")), "1 tensors are missing, the first lm_head.weight"),
    "larger vocabulary": (model(vocab_size=97),
        r"embed_tokens\.weight is \[96, 128\] and the config makes it \[97, 128\]"),
    "wider": (model(hidden_size=256), r"q_proj\.weight is \[128, 128\] and the config makes it \[256, 256\]"),
    "more layers": (model(num_hidden_layers=3), r"9 tensors are missing, the first model\.layers\.2\."),
    "fewer layers": (model(num_hidden_layers=1), r"9 do not belong to it, the first model\.layers\.1\."),
    "integers": (model(having(**{UP: mx.zeros((256, 128), mx.int8)})),
        f"tensor {UP} is I8; weights must be F32, F16, BF16"),
    "head of nobody knows what": (model(tie_word_embeddings=None),
        r'lm_head\.weight is stored, .*"tie_word_embeddings": false'),
    "no rows": (model(having(**{UP: mx.zeros((0, 128))})), rf"{UP} is \[0, 128\] and the config makes it \[256, 128\]"),
    "tensor of nothing": (model(having(empty=mx.zeros((0, 4)))), "1 do not belong to it, the first empty"),
    "vocabulary of none": (model(vocab_size=0),
        r"config\.json does not describe a llama model as mlx-lm has it: vocab_size 0; download"),
    "width of none": (model(intermediate_size=0),
        "does not describe a llama model as mlx-lm has it: intermediate_size 0; download"),
    # values
    "NaN": (model(with_value(UP, np.nan)), f"tensor {UP} of model.safetensors has 1 NaN or infinite values"),
    "infinite norm": (model(with_value("model.norm.weight", np.inf)), "model.norm.weight of .* 1 NaN or infinite"),
    "NaN in an expert": (experts(having(**{f"{EXPERT}.1.up_proj.weight": mx.full((64, 128), mx.nan, mx.bfloat16)})),
                         r"switch_mlp\.up_proj\.weight has NaN or infinite values"),
    "too large for scales": (model(with_value(UP, 1e8)),
        r"up_proj has weights up to 1e\+08, which float16 scales cannot hold"),
    # experts
    "more experts": (experts(num_experts=8),
        r"lack 'model\.layers\.0\.mlp\.experts\.4\.\S+'.* numbers of layers and experts"),
    "fewer experts": (experts(num_experts=2), r"mlp\.gate\.weight is \[4, 128\] and the config makes it \[2, 128\]"),
    "one expert short": (experts(without(f"{EXPERT}.2.up_proj.weight")),
        rf"the weights lack '{EXPERT}\.2\.up_proj\.weight'"),
    "wider router": (experts(having(**{"model.layers.0.mlp.gate.weight": mx.zeros((6, 128))})),
                     r"mlp\.gate\.weight is \[6, 128\] and the config makes it \[4, 128\]"),
    "more packed experts": (published("gpt_oss", num_local_experts=8),
                            r"gate_proj\.weight is \[4, 288, 288\] and the config makes it \[8, 288, 288\]"),
    "fewer packed experts": (published("gpt_oss", num_local_experts=2),
                             r"gate_proj\.weight is \[4, 288, 288\] and the config makes it \[2, 288, 288\]"),
    # quantized
    **{name: (method(name, bits=4), rf"quantized already \({name}\), {UNDONE}")
       for name in ("gptq", "awq", "bitsandbytes", "compressed-tensors", "hqq", "fbgemm_fp8", "nonsense")},
    "NVFP4": (method("modelopt", quant_algo="NVFP4"), rf"quantized already \(modelopt, NVFP4\), {UNDONE}"),
    "NVFP4 of no method": (model(quantization_config={"quant_algo": "NVFP4"}),
        rf"quantized already \(NVFP4\), {UNDONE}"),
    "NVFP4 by MLX": (packed("nvfp4", 4, 16), rf"quantized already \(nvfp4\), {UNDONE}"),
    "quantized unsaid": (model(having(**{f"{UP}_scale": mx.zeros((256, 8), mx.uint8)})),
                         rf"the first {UP}_scale; the model is quantized in a way that config.json does not state"),
    "FP8": (float8,
        r"tensor model\.\S+ is F8_E4M3, which mlx-lm does not undo for this architecture; give the original"),
    "FP8 taken for integers": (partial(float8, model_type="ministral3", rope_parameters=ROPE),
                               r"tensor model\.\S+ is F8_E4M3, which mlx-lm does not undo for this architecture"),
    # no models
    "nothing": (files(), "is empty; give a folder with config.json and model"),
    "config alone": (files("config.json"), r"holds no model\*\.safetensors \(found config\.json\)"),
    "GGUF": (files("m.Q4_K_M.gguf", "config.json"),
        r"has its weights in m\.Q4_K_M\.gguf, quantized already for llama\.cpp"),
    "PEFT": (files("adapter_config.json", "adapter_model.safetensors"), "holds an adapter, not a model; merge it"),
    "LoRA of mlx-lm": (files("adapter_config.json", "adapters.safetensors"), "holds an adapter, .*mlx_lm.fuse"),
    "adapter beside a model": (beside("adapter_model.safetensors"),
        r"an adapter \(adapter_model\.safetensors\) beside the"),
    "adapter in a model": (model(having(**LORA)), r"lora_A\.weight; this is an adapter: merge it into its base first"),
}  # fmt: skip


@pytest.fixture
def services(tmp_path: Path) -> Generator[Services]:
    with open_services(Settings(tmp_path / "home")) as services:
        yield services


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_by_name_and_leaves_nothing(services: Services, tmp_path: Path, case: str) -> None:
    make, message = CASES[case]
    make(tmp_path / "in")
    with pytest.raises(EXPECTED, match=message):
        services.convert(str(tmp_path / "in"), recipe=QuantConfig(group_size=32), output=tmp_path / "made" / "out")
    assert services.list_models().total == 0
    assert not list((tmp_path / "made").glob("*"))
    assert os.listdir(tmp_path / "home" / "models") == [".staging"]
    assert not list((tmp_path / "home" / "models" / ".staging").iterdir())


@pytest.mark.parametrize("name", ["model.Q4_K_M.gguf", "pytorch_model.bin"])
def test_a_file_of_another_format_is_refused_as_its_folder_is(services: Services, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(EXPECTED, match=rf"has its weights in {name}"):
        services.convert(str(tmp_path / name), recipe=QuantConfig())


def test_tied_embeddings_that_are_stored_twice_are_written_once(tmp_path: Path) -> None:
    def twice(made: Weights) -> Weights:
        return made | {"lm_head.weight": made["model.embed_tokens.weight"]}

    made = convert(write_model(tmp_path / "in", weights=twice, tie_word_embeddings=True), tmp_path / "out")
    assert made.excluded["lm_head"] == "not used by the model, not copied"
    assert "lm_head.weight" not in mx.load(str(tmp_path / "out" / "model.safetensors"))


def test_an_outlier_of_ten_thousand_spoils_no_row_but_its_own(tmp_path: Path) -> None:
    written: list[Weights] = []
    for name, change in (("plain", having()), ("outlier", with_value(UP, 1e4))):
        convert(write_model(tmp_path / name, weights=change), tmp_path / f"{name}-out")
        held = mx.load(str(tmp_path / f"{name}-out" / "model.safetensors"))
        assert isinstance(held, dict)
        written.append(held)
    plain, outlier = written
    for name in plain:
        rows = [mx.array_equal(a, b).item() for a, b in zip(plain[name], outlier[name], strict=True)]
        assert rows == [row > 0 or UP.rpartition(".")[0] not in name for row in range(len(rows))], name
    scales = outlier[UP.replace("weight", "scales")]
    assert mx.all(mx.isfinite(scales)).item() and scales[0].max() > 1e4 / 128**0.5
