"""Exported models in plain mlx-lm, without any code of this project."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from quant_engine.config import QuantConfig
from quant_engine.convert import convert
from quant_engine.errors import OutputError, RecipeError, UnsupportedModelError
from quant_engine.export import export
from quant_engine.loader import load_source
from quant_engine.source import resolve
from tests.quant_engine.checkpoints import write_large_model
from tests.quant_engine.published import NAMES, TOKENS, write_published

ARCHITECTURES = ("demo", *NAMES)


def _convert(name: str, demo_model: Path, folder: Path, **recipe: Any) -> Path:
    source = demo_model if name == "demo" else write_published(name, folder / "published")
    config = QuantConfig(**{"bits": 3, "group_size": 32} | recipe)
    return convert(source, folder / "converted", config=config, keep_unfitting=True).path


EXACT = 1e-4
"""Experts behind a recurrence come to 7e-5 where each weight is off by a float32's last bit, and to 4e-5 by sums in
another order."""


@pytest.fixture(scope="module", params=ARCHITECTURES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def converted(name: str, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _convert(name, demo_model, tmp_path_factory.mktemp(name))


@pytest.fixture(scope="module")
def floats(converted: Path) -> Path:
    """The float32 export."""
    return export(converted, converted.parent / "float32", dtype="float32").path


@pytest.fixture(scope="module")
def small(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, converted."""
    return _convert("demo", demo_model, tmp_path_factory.mktemp("small"))


def logits(model: Any) -> mx.array:
    return model(mx.array([TOKENS]))[0].astype(mx.float32)


def difference(found: Any, expected: Any) -> float:
    return float(mx.abs(logits(found) - logits(expected)).max() / mx.abs(logits(expected)).max())


def parameters(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def test_the_float_export_gives_the_logits_of_the_converted_model(name: str, converted: Path, floats: Path) -> None:
    plain, _ = load_model(floats)
    ours = load_source(resolve(converted), dtype="float32")
    if name == "gpt_oss":  # mlx-lm rounds the ends of YaRN's ramp, which this project corrects in its own loader
        assert difference(plain, ours) < 2e-3
        for theirs, exact in zip(plain.layers, ours.layers, strict=True):
            theirs.self_attn.rope = exact.self_attn.rope
    assert difference(plain, ours) < EXACT


def test_the_float_export_loads_here_too(converted: Path, floats: Path) -> None:
    ours = load_source(resolve(converted), dtype="float32")
    assert difference(load_source(resolve(floats), dtype="float32"), ours) < EXACT


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_transformers_opens_the_float_export_of_dense_models(
    architecture: str, demo_model: Path, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    converted = _convert(architecture, demo_model, tmp_path)
    made = export(converted, tmp_path / "out", dtype="float32")
    theirs, told = transformers.AutoModelForCausalLM.from_pretrained(
        made.path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(told.values())
    with torch.no_grad():
        found = mx.array(theirs.eval()(torch.tensor([TOKENS])).logits[0].numpy())
    expected = logits(load_source(resolve(converted), dtype="float32"))
    assert float(mx.abs(found - expected).max() / mx.abs(expected).max()) < 1e-4


@pytest.mark.parametrize(("form", "bits"), [("affine", 3), ("affine", 8), ("mxfp4", 4)])
def test_a_quantized_export_is_mlxs_quantization_of_the_dequantized_weights(
    converted: Path, form: str, bits: int
) -> None:
    settings = {"bits": bits, "group_size": 32}
    made = export(converted, converted.parent / f"{form}{bits}", form=form, **settings)
    loaded, config = load_model(made.path)
    assert config["quantization"] == {**settings, "mode": form}
    expected, _ = load_model(export(converted, converted.parent / "bfloat16", overwrite=True).path)
    modules = json.loads((converted / "config.json").read_text())["quantization"]["modules"]
    nn.quantize(expected, **settings, mode=form, class_predicate=lambda path, _: path in modules)
    found = parameters(loaded)
    assert found.keys() == parameters(expected).keys()
    assert sum(name.endswith(".scales") for name in found) == len(modules)
    for name, array in parameters(expected).items():
        assert found[name].dtype == array.dtype and mx.array_equal(found[name], array), name
    assert mx.isfinite(logits(loaded)).all()
    assert made.bits_per_weight == bits + {"affine": 1.0, "mxfp4": 0.25}[form]


def test_floats_that_mlx_lm_keeps_in_float32_stay_so(demo_model: Path, tmp_path: Path) -> None:
    made = export(_convert("qwen3_5", demo_model, tmp_path), tmp_path / "out", dtype="float16")
    dtypes = {name: array.dtype for name, array in mx.load(str(made.path / "model.safetensors")).items()}
    kept = {name for name, dtype in dtypes.items() if dtype != mx.float16}
    assert kept and all(name.endswith("A_log") for name in kept)


def test_embeddings_and_the_output_projection_are_exported_in_the_form_too(demo_model: Path, tmp_path: Path) -> None:
    converted = _convert("llama", demo_model, tmp_path, embed_bits=4, head_bits=3)
    plain, _ = load_model(export(converted, tmp_path / "float", dtype="float32").path)
    assert difference(plain, load_source(resolve(converted), dtype="float32")) < 1e-5
    quantized, _ = load_model(export(converted, tmp_path / "affine", form="affine", group_size=32).path)
    assert isinstance(quantized.model.embed_tokens, nn.QuantizedEmbedding)
    assert isinstance(quantized.lm_head, nn.QuantizedLinear)


def test_the_corrections_of_qjl_are_added_piece_by_piece(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted = _convert("demo", demo_model, tmp_path, bits=2, use_qjl=True)
    whole = mx.load(str(export(converted, tmp_path / "whole", dtype="float32").path / "model.safetensors"))
    plain, _ = load_model(tmp_path / "whole")
    assert difference(plain, load_source(resolve(converted), dtype="float32")) < 1e-4
    monkeypatch.setattr(importlib.import_module("quant_engine.export"), "CHUNK_VALUES", 5000)
    pieces = mx.load(str(export(converted, tmp_path / "pieces", dtype="float32").path / "model.safetensors"))
    assert whole.keys() == pieces.keys()
    assert all(mx.allclose(array, pieces[name], atol=1e-6) for name, array in whole.items())


def test_the_folder_is_that_of_a_plain_model(small: Path, tmp_path: Path) -> None:
    made = export(small, tmp_path / "out")
    config = json.loads((made.path / "config.json").read_text())
    before = json.loads((small / "config.json").read_text())
    assert "quantization" not in config and "turboquant" not in json.dumps(config)
    assert config["dtype" if "dtype" in before else "torch_dtype"] == "bfloat16"
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (made.path / file).read_bytes() == (small / file).read_bytes()
    card = (made.path / "README.md").read_text()
    assert "converted" in card and "demo_model" in card and "## Licence" in card
    assert {file.name: file.size_bytes for file in made.files} == {
        path.name: path.stat().st_size for path in made.path.iterdir()
    }
    assert made.size_bytes == (made.path / "model.safetensors").stat().st_size
    assert (made.form, made.bits, made.group_size, made.dtype, made.bits_per_weight) == (
        "float", None, None, "bfloat16", None,
    )  # fmt: skip


def test_the_block_of_the_originals_own_quantization_goes(demo_model: Path, tmp_path: Path) -> None:
    converted = _convert("gpt_oss", demo_model, tmp_path)
    assert "quantization_config" in json.loads((converted / "config.json").read_text())
    config = json.loads((export(converted, tmp_path / "out").path / "config.json").read_text())
    assert not {"quantization", "quantization_config"} & set(config)


def test_shards_have_an_index(small: Path, tmp_path: Path) -> None:
    made = export(small, tmp_path / "shards", form="affine", max_shard_bytes=1_000_000)
    listed = json.loads((made.path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(listed.values())) > 1
    assert {file.name for file in made.files if file.name.endswith(".safetensors")} == set(listed.values())
    load_model(made.path)


def test_progress_reaches_the_bytes_of_the_source(small: Path, tmp_path: Path) -> None:
    ticks: list[tuple[int, int]] = []
    export(small, tmp_path / "out", progress=lambda done, total, _: ticks.append((done, total)))
    done = [tick[0] for tick in ticks]
    assert done == sorted(done) and ticks[-1][0] == ticks[-1][1] > 0


class TestRefusals:
    """What cannot be exported is said before anything is written, and what fails leaves nothing."""

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"form": "gguf"}, "form 'gguf'; choose one of float, affine, mxfp4"),
            ({"form": "affine", "bits": 5}, "bits 5 for form 'affine', which takes 2, 3, 4, 6, 8"),
            ({"form": "affine", "bits": 0}, "bits 0"),
            ({"form": "affine", "group_size": 16}, "group_size 16 for form 'affine', which takes 32, 64, 128"),
            ({"form": "mxfp4", "group_size": 64}, "group_size 64 for form 'mxfp4', which takes 32"),
            ({"form": "float", "bits": 4}, "bits 4 for form 'float', which takes none"),
            ({"dtype": "int8"}, "dtype 'int8'; choose one of float32, float16, bfloat16"),
        ],
    )
    def test_a_form_that_does_not_exist(
        self, small: Path, tmp_path: Path, settings: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(RecipeError, match=message):
            export(small, tmp_path / "out", **settings)
        assert list(tmp_path.iterdir()) == []

    def test_groups_that_do_not_divide_a_width(self, demo_model: Path, tmp_path: Path) -> None:
        converted = _convert("llama", demo_model, tmp_path)
        with pytest.raises(RecipeError, match=r"group_size 64 does not divide the width 96 of .*; .* are 32"):
            export(converted, tmp_path / "out", form="affine")
        assert not (tmp_path / "out").exists()

    def test_a_model_that_was_not_converted(self, demo_model: Path, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedModelError, match="was not converted by TurboQuant"):
            export(demo_model, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_the_model_itself_as_output(self, small: Path) -> None:
        with pytest.raises(OutputError, match="is the model itself"):
            export(small, small, overwrite=True)
        resolve(small)

    def test_an_output_that_exists_unless_told_to(self, small: Path, tmp_path: Path) -> None:
        export(small, tmp_path / "out")
        with pytest.raises(OutputError, match="exists already"):
            export(small, tmp_path / "out", form="mxfp4")
        made = export(small, tmp_path / "out", form="mxfp4", overwrite=True)
        assert json.loads((made.path / "config.json").read_text())["quantization"]["mode"] == "mxfp4"

    @pytest.mark.parametrize("overwritten", [False, True])
    def test_a_stop_halfway_leaves_what_was_there(self, small: Path, tmp_path: Path, overwritten: bool) -> None:
        if overwritten:
            shutil.copytree(small, tmp_path / "out")

        def stop(done: int, total: int, message: str) -> None:
            if done > total // 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            export(small, tmp_path / "out", overwrite=overwritten, progress=stop)
        assert [path.name for path in tmp_path.iterdir()] == (["out"] if overwritten else [])
        if overwritten:
            resolve(tmp_path / "out")

    def test_values_beyond_float16(self, small: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(small, tmp_path / "large"))
        tensors = mx.load(str(folder / "model.safetensors"))
        tensors["model.norm.weight"] = mx.full(tensors["model.norm.weight"].shape, 1e6, mx.float32)
        mx.save_safetensors(str(folder / "model.safetensors"), tensors)
        with pytest.raises(RecipeError, match=r"model\.norm\.weight has values beyond the range of F16"):
            export(folder, tmp_path / "out", dtype="float16")
        assert [path.name for path in tmp_path.iterdir()] == ["large"]


MEASURED = """
import json, sys
from quant_engine.convert import peak_memory_bytes
from quant_engine.export import export
start = peak_memory_bytes()
export(sys.argv[1], sys.argv[2], form="affine")
print(json.dumps([start, peak_memory_bytes()]))
"""


def test_exporting_500_mb_takes_less_memory_than_its_largest_layer(tmp_path: Path) -> None:
    """Counted from the process's start with its libraries loaded."""
    largest = write_large_model(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "converted")
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "converted"), str(tmp_path / "out")]
    start, peak = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert peak - start < largest
