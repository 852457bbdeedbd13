import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from quant_engine.config import QuantConfig
from quant_engine.convert import convert
from quant_engine.errors import (
    CorruptCheckpointError,
    OutputError,
    RecipeError,
    SourceError,
    TurboQuantError,
    UnsafeModelError,
    UnsupportedModelError,
)
from quant_engine.file_hash import file_sha256
from quant_engine.manifest import Manifest
from quant_engine.quantizer import QuantizedWeight, dequantize_weight, quantize_weight
from quant_engine.residual import Residual
from quant_engine.source import resolve
from tests.quant_engine.checkpoints import write_large_model, write_model

UP = "model.layers.1.mlp.up_proj"


def _tensors(folder: Path) -> dict[str, mx.array]:
    found: dict[str, mx.array] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        held = mx.load(str(shard))
        assert isinstance(held, dict)
        found |= held
    return found


def _listing(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.mark.parametrize(("bits", "per_weight"), [(2, 2.25), (3, 3.25), (4, 4.25)])
def test_bits_a_weight_are_computed_from_the_bytes_on_disk(tmp_path: Path, bits: int, per_weight: float) -> None:
    made = convert(write_model(tmp_path / "in"), tmp_path / "out", config=QuantConfig(bits=bits))
    held = _tensors(tmp_path / "out")
    packed = sum(a.nbytes for n, a in held.items() if n.endswith(".scales") or a.dtype == mx.uint32)
    assert made.bits_per_weight == 8 * packed / made.quantized_parameters == per_weight
    assert made.size_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_layers_are_quantized_as_the_quantizer_does_and_the_rest_is_copied_bit_for_bit(
    tmp_path: Path, model_type: str
) -> None:
    made = convert(write_model(tmp_path / "in", model_type=model_type, shards=2), tmp_path / "out")
    before, after = _tensors(tmp_path / "in"), _tensors(tmp_path / "out")
    manifest = Manifest.from_config(resolve(tmp_path / "out").config)
    assert manifest is not None and len(manifest.modules) == made.modules == 14
    for name, array in before.items():
        path = name.removesuffix(".weight")
        if path in manifest.modules:
            expected = quantize_weight(array, QuantConfig())
            assert mx.array_equal(after[name], expected.packed)
            assert mx.array_equal(after[f"{path}.scales"], expected.scales)
        else:
            assert after[name].dtype == array.dtype
            assert mx.array_equal(after[name].view(mx.uint16), array.view(mx.uint16))
    assert set(after) == set(before) | {f"{path}.scales" for path in manifest.modules}


def test_the_written_model_restores_weights_from_the_folder_alone(tmp_path: Path) -> None:
    recipe = QuantConfig(bits=4, group_size=32, seed=9, use_qjl=True)
    convert(write_model(tmp_path / "in"), tmp_path / "out", config=recipe)
    source = resolve(tmp_path / "out")
    manifest, held = Manifest.from_config(source.config), _tensors(tmp_path / "out")
    assert manifest is not None
    manifest.check_tensors({name: (info.dtype, info.shape) for name, info in source.tensors.items()})
    entry = manifest.modules[UP]
    errors = Residual(held[f"{UP}.qjl_signs"], held[f"{UP}.qjl_norms"], entry.shape[1], manifest.seed)
    weight = QuantizedWeight(held[f"{UP}.weight"], held[f"{UP}.scales"], manifest.codebook(entry.bits), entry.bits,
                             entry.group_size, manifest.seed, entry.block, errors)  # fmt: skip
    original = _tensors(tmp_path / "in")[f"{UP}.weight"].astype(mx.float32)
    error = mx.square(dequantize_weight(weight) - original).sum() / mx.square(original).sum()
    assert float(error) < 0.005


def test_the_result_describes_the_folder(tmp_path: Path) -> None:
    made = convert(write_model(tmp_path / "in"), tmp_path / "out")
    assert made.path == tmp_path / "out"
    assert made.source == resolve(tmp_path / "in").origin()
    assert [file.name for file in made.files] == _listing(tmp_path / "out") == [
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    for file in made.files:
        assert (tmp_path / "out" / file.name).stat().st_size == file.size_bytes
        assert file_sha256(tmp_path / "out" / file.name) == file.sha256
    assert made.quantized_parameters + 2 * 96 * 128 + 5 * 128 == made.parameters
    assert made.source_size_bytes == resolve(tmp_path / "in").size_bytes
    assert made.seconds > 0 and made.peak_memory_bytes > 10**7
    assert made.excluded["lm_head"] == "output projection"
    assert "license: apache-2.0" in (tmp_path / "out" / "README.md").read_text()


def test_the_config_keeps_all_it_had_and_gains_the_manifest(tmp_path: Path) -> None:
    convert(write_model(tmp_path / "in", rope_theta=5e5, custom={"a": [1]}), tmp_path / "out")
    before, after = (json.loads((tmp_path / side / "config.json").read_text()) for side in ("in", "out"))
    assert {key: value for key, value in after.items() if key != "quantization"} == before
    assert after["quantization"]["source"]["name"] == "in"


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    write_model(tmp_path / "in")
    first, again = (convert(tmp_path / "in", tmp_path / name / "same") for name in ("a", "b"))
    assert first.files == again.files


def test_large_models_are_written_in_shards_with_an_index(tmp_path: Path) -> None:
    made = convert(write_model(tmp_path / "in"), tmp_path / "out", max_shard_bytes=40_000)
    shards = [file.name for file in made.files if file.name.startswith("model-")]
    assert len(shards) > 3
    assert made.size_bytes == sum((tmp_path / "out" / name).stat().st_size for name in shards)
    assert set(resolve(tmp_path / "out").tensors) == set(_tensors(tmp_path / "out"))


@pytest.mark.parametrize(("dtype", "expected"), [("float32", mx.float32), ("float16", mx.float16)])
def test_kept_weights_take_the_dtype_that_was_asked_for(tmp_path: Path, dtype: str, expected: mx.Dtype) -> None:
    convert(write_model(tmp_path / "in"), tmp_path / "out", dtype=dtype)
    before, after = _tensors(tmp_path / "in"), _tensors(tmp_path / "out")
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert mx.array_equal(after[name], before[name].astype(expected))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == dtype


def test_float32_can_become_bfloat16(tmp_path: Path) -> None:
    convert(write_model(tmp_path / "in", dtype=mx.float32), tmp_path / "out", dtype="bfloat16")
    before, after = _tensors(tmp_path / "in"), _tensors(tmp_path / "out")
    assert mx.array_equal(after["lm_head.weight"], before["lm_head.weight"].astype(mx.bfloat16))


def test_values_that_a_dtype_cannot_hold_are_refused(tmp_path: Path) -> None:
    write_model(
        tmp_path / "in", weights=lambda made: made | {"model.norm.weight": mx.full(128, 1e6).astype(mx.bfloat16)}
    )
    with pytest.raises(RecipeError, match=r"tensor model\.norm\.weight has values beyond the range of F16"):
        convert(tmp_path / "in", tmp_path / "out", dtype="float16")
    assert _listing(tmp_path) == ["in"]


@pytest.mark.parametrize("name", [f"{UP}.weight", "model.embed_tokens.weight", "model.norm.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, name: str, value: float) -> None:
    def spoil(made: dict[str, mx.array]) -> dict[str, mx.array]:
        flat = np.array(made[name].astype(mx.float32)).reshape(-1)
        flat[7] = value
        return made | {name: mx.array(flat).reshape(made[name].shape).astype(mx.bfloat16)}

    write_model(tmp_path / "in", weights=spoil)
    with pytest.raises(CorruptCheckpointError, match=f"tensor {name} of model.safetensors has 1 NaN or infinite"):
        convert(tmp_path / "in", tmp_path / "out")
    assert _listing(tmp_path) == ["in"]


def test_outliers_survive(tmp_path: Path) -> None:
    write_model(tmp_path / "in", weights=lambda made: made | {f"{UP}.weight": made[f"{UP}.weight"] * 2e5})
    convert(tmp_path / "in", tmp_path / "out")
    assert mx.all(mx.isfinite(_tensors(tmp_path / "out")[f"{UP}.scales"]))


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"model_type": "gpt_oss"}, CorruptCheckpointError),
        ({"model_type": "nonsense"}, UnsupportedModelError),
        ({"quantization_config": {"quant_method": "gptq"}}, UnsupportedModelError),
        ({"auto_map": {"AutoModel": "x.Y"}}, UnsafeModelError),
        ({"num_hidden_layers": 2, "intermediate_size": 172}, RecipeError),
        ({"weights": lambda made: {n: a for n, a in made.items() if n != f"{UP}.weight"}}, CorruptCheckpointError),
    ],
)
def test_what_cannot_be_converted_is_refused_before_anything_is_written(
    tmp_path: Path, settings: dict[str, Any], kind: type[TurboQuantError]
) -> None:
    write_model(tmp_path / "in", **settings)
    with pytest.raises(kind):
        convert(tmp_path / "in", tmp_path / "out")
    assert _listing(tmp_path) == ["in"]


def test_a_converted_model_is_not_converted_again(tmp_path: Path) -> None:
    convert(write_model(tmp_path / "in"), tmp_path / "out")
    with pytest.raises(UnsupportedModelError, match="converted by TurboQuant already"):
        convert(tmp_path / "out", tmp_path / "again")


def test_layers_that_do_not_fit_can_be_kept(tmp_path: Path) -> None:
    made = convert(write_model(tmp_path / "in", intermediate_size=172), tmp_path / "out", keep_unfitting=True)
    assert made.modules == 12
    assert "172" in made.excluded["model.layers.0.mlp.down_proj"]


def test_outputs_that_would_destroy_something_are_refused(tmp_path: Path) -> None:
    model = write_model(tmp_path / "in")
    with pytest.raises(OutputError, match="is the source itself"):
        convert(model, model, overwrite=True)
    convert(model, tmp_path / "out")
    with pytest.raises(OutputError, match="exists already"):
        convert(model, tmp_path / "out", config=QuantConfig(bits=2))
    assert convert(model, tmp_path / "out", config=QuantConfig(bits=2), overwrite=True).bits_per_weight == 2.25
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]["bits"] == 2


def test_a_missing_source_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no model at"):
        convert(tmp_path / "in", tmp_path / "out")
    assert _listing(tmp_path) == []


def test_progress_counts_up_to_all_bytes_of_the_source(tmp_path: Path) -> None:
    steps: list[tuple[int, int, str]] = []
    convert(write_model(tmp_path / "in"), tmp_path / "out", progress=lambda *step: steps.append(step))
    done = [step[0] for step in steps]
    total = sum(info.nbytes for info in resolve(tmp_path / "in").tensors.values())
    assert done == sorted(done) and done[-1] == total
    assert {step[1] for step in steps} == {total}
    assert UP in {step[2] for step in steps}


def test_an_exception_in_progress_stops_the_work_and_leaves_nothing(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int, message: str) -> None:
        if done > total / 2:
            raise Stop

    write_model(tmp_path / "in")
    with pytest.raises(Stop):
        convert(tmp_path / "in", tmp_path / "out", progress=stop)
    assert _listing(tmp_path) == ["in"]


def test_a_source_that_changes_while_it_is_converted_is_refused(tmp_path: Path) -> None:
    def touch(done: int, total: int, message: str) -> None:
        if message == UP:
            os.utime(tmp_path / "in" / "model.safetensors")

    write_model(tmp_path / "in")
    with pytest.raises(CorruptCheckpointError, match=r"changed while they were converted; run it again$"):
        convert(tmp_path / "in", tmp_path / "out", progress=touch)
    assert _listing(tmp_path) == ["in"]


@pytest.mark.parametrize("failing", ["pwrite", "fsync"])
def test_an_error_of_a_thread_that_writes_or_finishes_comes_out_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    count = threading.active_count()

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "no space")

    write_model(tmp_path / "in")
    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OutputError, match="the disk is full; nothing was left there"):
        convert(tmp_path / "in", tmp_path / "out", max_shard_bytes=40_000)
    assert _listing(tmp_path) == ["in"]
    assert threading.active_count() <= count


@pytest.fixture
def interruptible() -> Generator[None]:
    """Interrupts are errors, also of tests in a shell's background, which would ignore them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_leaves_neither_files_nor_threads(tmp_path: Path) -> None:
    count = threading.active_count()

    def interrupt(done: int, total: int, message: str) -> None:
        if message == UP:
            signal.raise_signal(signal.SIGINT)

    write_model(tmp_path / "in")
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "in", tmp_path / "out", max_shard_bytes=40_000, progress=interrupt)
    assert _listing(tmp_path) == ["in"]
    assert threading.active_count() <= count


SLOW = """
import sys, time
from quant_engine.convert import convert
def progress(done, total, message):
    if done > total / 2:
        print("half", flush=True)
        time.sleep(60)
convert(sys.argv[1], sys.argv[2], progress=progress)
"""


def test_a_killed_conversion_leaves_no_model_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    write_model(tmp_path / "in")
    command = [sys.executable, "-c", SLOW, str(tmp_path / "in"), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
    partial, source = _listing(tmp_path)
    assert partial.startswith(".out.partial-") and source == "in"
    convert(tmp_path / "in", tmp_path / "out")
    assert _listing(tmp_path) == ["in", "out"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (QuantConfig(protect_layers=1000), "nothing is left to quantize with protect_layers"),
        (QuantConfig(skip=("nomatch.*",)), "skip has the pattern 'nomatch"),
    ],
)
def test_a_recipe_that_does_nothing_is_refused_before_anything_is_written(
    tmp_path: Path, config: QuantConfig, words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        convert(write_model(tmp_path / "in"), tmp_path / "out", config=config)
    assert _listing(tmp_path) == ["in"]


FULL = """
import resource, signal, sys
from quant_engine.convert import convert
from quant_engine.errors import OutputError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    convert(sys.argv[1], sys.argv[2])
except OutputError as error:
    print(error)
"""


def test_a_system_that_refuses_to_write_more_leaves_nothing(tmp_path: Path) -> None:
    write_model(tmp_path / "in")
    command = [sys.executable, "-c", FULL, str(tmp_path / "in"), str(tmp_path / "out")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "cannot write" in said and "nothing was left there" in said
    assert _listing(tmp_path) == ["in"]


MEASURED = """
import json, sys
from quant_engine.convert import convert, peak_memory_bytes
start = peak_memory_bytes()
made = convert(sys.argv[1], sys.argv[2])
print(json.dumps([start, made.peak_memory_bytes, made.bits_per_weight]))
"""


def test_converting_500_mb_takes_less_memory_than_its_largest_layer(tmp_path: Path) -> None:
    """Counted from the process's start with its libraries loaded; 300 MB more than that layer would be allowed."""
    largest = write_large_model(tmp_path / "in")
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "in"), str(tmp_path / "out")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    start, peak, bits_per_weight = json.loads(printed)
    assert bits_per_weight == 3.25
    assert peak - start < largest
