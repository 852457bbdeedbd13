import sys
from collections.abc import Callable, Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import psutil
import pytest

from quant_engine.config import QuantConfig
from quant_engine.convert import convert
from quant_engine.errors import CorruptCheckpointError, InputError, RecipeError, UnsafeModelError, UnsupportedModelError
from quant_engine.plan import RUNTIME_BYTES, cache_bytes, plan
from quant_engine.source import read_json
from tests.quant_engine.checkpoints import CONFIG, write_model
from tests.quant_engine.local_hub import COMMIT, REPOSITORY, LocalHub, local_hub
from tests.quant_engine.published import NAMES, write_published

plan_module = sys.modules["quant_engine.plan"]


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


TIED = ("cohere2", "gemma2", "gemma3_text", "lfm2", "qwen2")
WIDTHS = {"attn_bits": 4, "mlp_bits": 2, "embed_bits": 4, "head_bits": 3}
EXPERT_WIDTHS = {**WIDTHS, "expert_bits": 2, "expert_down_bits": 3}
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in NAMES),
    *((name, {"widths": WIDTHS}) for name in ("llama", *TIED)),
    *((name, {"widths": EXPERT_WIDTHS}) for name in ("qwen3_moe", "gpt_oss", "mixtral", "qwen3_5_moe")),
    *((name, {"use_qjl": True}) for name in ("llama", "gemma2", "qwen2", "phi3")),
    *((name, {"fold_rotation": True}) for name in ("llama", "mistral", "qwen2", "qwen3")),
    ("qwen2", {"fold_rotation": True, "use_qjl": True, "widths": WIDTHS}),
    ("llama", {"group_size": 0}),
    ("llama", {"widths": {"groups_for": [("*.up_proj", 0), ("*.down_proj", 64)], "skip": ["*.0.*"]}}),
]


@pytest.mark.parametrize(("name", "settings"), CASES, ids=[f"{n}-{'-'.join(s) or 'usual'}" for n, s in CASES])
def test_sizes_are_those_of_the_files_of_every_architecture(
    tmp_path: Path, name: str, settings: dict[str, Any]
) -> None:
    model = write_published(name, tmp_path / "made")
    settings = {"group_size": 32, **settings}
    (row,) = plan(model, bits=[3], keep_unfitting=True, **settings).rows
    recipe = QuantConfig(bits=3, **settings.pop("widths", {}), **settings)
    made = convert(model, tmp_path / "out", config=recipe, keep_unfitting=True)
    assert row.size_bytes == sum(file.stat().st_size for file in made.path.glob("*.safetensors"))


@pytest.mark.parametrize("name", TIED)
def test_these_tie_their_embeddings(tmp_path: Path, name: str) -> None:
    config = read_json(write_published(name, tmp_path) / "config.json")
    assert config["tie_word_embeddings"]


def test_folding_takes_memory_to_convert_and_no_size(tmp_path: Path) -> None:
    model = write_model(tmp_path / "made")
    plain, folded = plan(model, bits=[3]), plan(model, bits=[3], fold_rotation=True)
    made = convert(model, tmp_path / "out", config=QuantConfig(fold_rotation=True))
    assert plain.rows[0].size_bytes == folded.rows[0].size_bytes == made.size_bytes
    assert folded.memory_to_convert_bytes - plain.memory_to_convert_bytes == 4 * 128 * 256
    with pytest.raises(UnsupportedModelError, match="fold_rotation does not fit 'gemma2'"):
        plan(write_published("gemma2", tmp_path / "gemma2"), fold_rotation=True)


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


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[LocalHub]:
    with local_hub(write_model(tmp_path / "repository", shards=2)) as hub:
        hub.use(monkeypatch, tmp_path / "cache")
        yield hub


def test_a_repository_is_planned_from_its_headers_without_its_weights(hub: LocalHub) -> None:
    local, remote = plan(hub.folder), plan(REPOSITORY)
    assert (remote.model, remote.revision) == (REPOSITORY, COMMIT)
    assert [row.size_bytes for row in remote.rows] == [row.size_bytes for row in local.rows]
    assert remote.source_size_bytes == local.source_size_bytes
    assert sorted(hub.fetched) == ["config.json", "model.safetensors.index.json"]


def test_the_disk_that_a_repository_takes_counts_what_is_fetched_at_a_time(hub: LocalHub) -> None:
    local, remote = plan(hub.folder), plan(REPOSITORY)
    largest = max(path.stat().st_size for path in hub.folder.glob("*.safetensors"))
    assert (local.download_bytes, remote.download_bytes) == (0, remote.source_size_bytes)
    assert [row.disk_bytes - row.size_bytes for row in local.rows] == [0, 0, 0]
    assert [row.disk_bytes - row.size_bytes for row in remote.rows] == [largest] * 3


def test_without_network_a_plan_uses_the_copy_in_the_cache(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    huggingface_hub.snapshot_download(REPOSITORY, revision=COMMIT)
    refs = tmp_path / "cache" / "models--owner--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub, "model_info", unreachable)
    said: list[str] = []
    assert plan(REPOSITORY, progress=lambda done, total, text: said.append(text)).revision == COMMIT
    assert said == ["no network: using the copy of owner/name downloaded before"]


def unreachable(*_: Any, **__: Any) -> Any:
    raise OSError("no route")


def test_a_repository_that_is_no_model_is_refused(hub: LocalHub) -> None:
    for path in hub.folder.glob("*.safetensors*"):
        path.unlink()
    (hub.folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UnsafeModelError, match=r"pytorch_model\.bin"):
        plan(REPOSITORY)


def test_a_repository_with_damaged_headers_is_refused(hub: LocalHub) -> None:
    file = "model-00002-of-00002.safetensors"
    (hub.folder / file).write_bytes(b"\x08" + b"\0" * 7 + b"nonsense")
    with pytest.raises(CorruptCheckpointError, match=rf"header of {file} of owner/name cannot be read"):
        plan(REPOSITORY)


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


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"protect_layers": 1000}, "nothing is left to quantize with protect_layers"),
        ({"skip": ["zzz"]}, "skip has the pattern"),
    ],
)
def test_a_recipe_that_does_nothing_is_refused(tmp_path: Path, widths: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        plan(write_model(tmp_path), widths=widths)
