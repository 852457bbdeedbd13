import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import psutil
import pytest

from quant_engine.config import QuantConfig
from quant_engine.convert import convert
from quant_engine.errors import CorruptCheckpointError, InputError, RecipeError, SourceError, UnsafeModelError
from quant_engine.plan import RUNTIME_BYTES, cache_bytes, plan
from quant_engine.safetensors_file import read_header
from tests.quant_engine.checkpoints import CONFIG, write_model
from tests.quant_engine.published import write_published

plan_module = sys.modules["quant_engine.plan"]

COMMIT = "89abcdef" * 5


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def have(available: int) -> None:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available, total=2 * available))

    return have


@pytest.mark.parametrize("group_size", [0, 32, 64])
@pytest.mark.parametrize("use_qjl", [False, True])
def test_sizes_are_exactly_those_of_the_conversion(tmp_path: Path, group_size: int, use_qjl: bool) -> None:
    model = write_model(tmp_path / "made")
    planned = plan(model, group_size=group_size, use_qjl=use_qjl)
    assert [row.bits for row in planned.rows] == [2, 3, 4]
    for row in planned.rows:
        recipe = QuantConfig(bits=row.bits, group_size=group_size, use_qjl=use_qjl)
        made = convert(model, tmp_path / f"out{row.bits}", config=recipe)
        assert row.size_bytes == made.size_bytes
        assert row.bits_per_weight == made.bits_per_weight
        assert row.compression == made.source_size_bytes / made.size_bytes
        assert (planned.parameters, planned.quantized_parameters) == (made.parameters, made.quantized_parameters)
        assert planned.excluded == made.excluded


def test_a_cache_is_counted_in_codes_and_scales() -> None:
    config = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
    assert cache_bytes(config, 1000, 16, 16) == 32 * 8 * 1000 * 2 * 128 * 2
    assert cache_bytes(config, 1000, 3, 3) == 32 * 8 * 1000 * 2 * (128 * 3 // 8 + 4)
    assert cache_bytes(config, 1000, 8, 4) == 32 * 8 * 1000 * (128 + 64 + 8)
    assert cache_bytes(CONFIG | {"head_dim": 64}, 10, 16, 16) == 2 * 2 * 10 * 2 * 64 * 2
    assert cache_bytes({**config, "num_key_value_heads": None}, 1, 16, 16) == 32 * 32 * 512


def test_memory_to_run_is_weights_cache_and_the_runtime(tmp_path: Path) -> None:
    planned = plan(write_model(tmp_path), bits=[3], context=1000)
    assert (planned.caches[0].k_bits, planned.caches[0].cache_bytes) == (16, cache_bytes(CONFIG, 1000, 16, 16))
    assert planned.rows[0].memory_bytes == planned.rows[0].size_bytes + planned.caches[0].cache_bytes + RUNTIME_BYTES


def test_the_most_bits_that_fit_are_recommended(tmp_path: Path, memory: Callable[[int], None]) -> None:
    write_model(tmp_path, num_hidden_layers=6, vocab_size=32)
    sizes = {row.bits: row.memory_bytes for row in plan(tmp_path).rows}
    memory(10**12)
    assert plan(tmp_path).recommended_bits == 4
    assert "the most accurate of the widths fits" in plan(tmp_path).reason
    memory(int((sizes[3] + sizes[4]) / 2 / 0.9))
    assert (plan(tmp_path).recommended_bits, [row.fits for row in plan(tmp_path).rows]) == (3, [True, True, False])
    assert "more bits do not fit" in plan(tmp_path).reason
    memory(10**6)
    assert plan(tmp_path).recommended_bits == 0
    assert "no width fits: 2 bits with 4,096 tokens take 0.6 GB" in plan(tmp_path).reason


def test_a_plan_is_json(tmp_path: Path) -> None:
    values = plan(write_model(tmp_path)).to_dict()
    assert values["rows"][1]["bits_per_weight"] == 3.25
    assert values["model_type"] == "llama"
    assert values["caches"][2] == {"k_bits": 8, "v_bits": 4, "cache_bytes": cache_bytes(CONFIG, 4096, 8, 4)}


@pytest.mark.parametrize("options", [{"bits": []}, {"context": 0}, {"context": 1.5}])
def test_questions_that_make_no_sense_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"no bits to plan for|a context of"):
        plan(write_model(tmp_path), **options)


def test_a_plan_raises_what_the_conversion_would(tmp_path: Path) -> None:
    write_model(tmp_path, intermediate_size=172)
    with pytest.raises(RecipeError, match="width of 172"):
        plan(tmp_path)
    assert plan(tmp_path, keep_unfitting=True).rows


class Hub:
    """huggingface_hub's functions that a plan calls, for a repository in a folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.names = {path.name: path.stat().st_size for path in folder.iterdir()}
        self.failure: Exception | None = None
        self.damaged = False
        for name in ("model_info", "hf_hub_download", "get_safetensors_metadata", "snapshot_download"):
            monkeypatch.setattr(huggingface_hub, name, getattr(self, name))

    def model_info(self, repo: str, **options: Any) -> Any:
        if self.failure:
            raise self.failure
        siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in self.names.items()]
        return SimpleNamespace(sha=COMMIT, siblings=siblings)

    def hf_hub_download(self, repo: str, file: str, *, revision: str) -> str:
        assert (file, revision) == ("config.json", COMMIT)
        return str(self.folder / file)

    def get_safetensors_metadata(self, repo: str, *, revision: str) -> Any:
        if self.damaged:
            raise huggingface_hub.errors.SafetensorsParsingError("bad header")
        header = read_header(self.folder / "model.safetensors")
        tensors = {
            n: SimpleNamespace(dtype=t.dtype, shape=list(t.shape), data_offsets=(t.start, t.end))
            for n, t in header.items()
        }
        return SimpleNamespace(files_metadata={"model.safetensors": SimpleNamespace(tensors=tensors)})

    def snapshot_download(self, repo: str, **options: Any) -> str:
        assert options["local_files_only"], "a plan downloads no weights"
        return str(self.folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.chdir(tmp_path)
    return Hub(write_model(tmp_path / "snapshots" / COMMIT), monkeypatch)


def test_a_repository_is_planned_from_its_headers_without_its_weights(hub: Hub) -> None:
    local, remote = plan(hub.folder), plan("owner/name")
    assert (remote.model, remote.revision) == ("owner/name", COMMIT)
    assert [row.size_bytes for row in remote.rows] == [row.size_bytes for row in local.rows]
    assert remote.source_size_bytes == local.source_size_bytes


def test_without_network_a_plan_uses_the_copy_in_the_cache(hub: Hub) -> None:
    hub.failure = OSError("no route")
    said: list[str] = []
    assert plan("owner/name", progress=lambda done, total, text: said.append(text)).revision == COMMIT
    assert said[0] == "no network: looking for a copy of owner/name downloaded before"


def test_a_repository_that_is_no_model_is_refused(hub: Hub) -> None:
    hub.names = {"config.json": 1, "pytorch_model.bin": 2}
    with pytest.raises(UnsafeModelError, match=r"pytorch_model\.bin"):
        plan("owner/name")


def test_a_repository_with_damaged_headers_is_refused(hub: Hub) -> None:
    hub.damaged = True
    with pytest.raises(
        (SourceError, CorruptCheckpointError), match=r"weights of owner/name cannot be read \(bad header\)"
    ):
        plan("owner/name")


def test_the_time_is_that_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "conversion_rate", lambda: 1000.0)
    planned = plan(write_model(tmp_path))
    assert planned.seconds_to_convert == planned.source_size_bytes / 1000


def test_a_rate_is_measured() -> None:
    assert plan_module.conversion_rate(rows=64) > 1e5


def test_experts_that_are_stacked_take_memory_to_convert(tmp_path: Path) -> None:
    dense, mixture = (plan(write_published(n, tmp_path / n), group_size=32) for n in ("llama", "qwen3_moe"))
    assert dense.memory_to_convert_bytes == RUNTIME_BYTES
    assert mixture.memory_to_convert_bytes == RUNTIME_BYTES + 2 * 8 * 64 * 32 * 2


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({"num_hidden_layers": 6}, (6, 0)),
        ({"num_hidden_layers": 6, "full_attention_interval": 3}, (2, 0)),
        ({"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "linear_attention"]}, (1, 1)),
    ],
)
def test_layers_without_keys_and_values_take_no_cache(config: dict[str, Any], layers: tuple[int, int]) -> None:
    assert plan_module.attention_layers(config) == layers
