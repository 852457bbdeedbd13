import fnmatch
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import mlx.core as mx
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from quant_engine.convert import convert
from quant_engine.errors import (
    CorruptCheckpointError,
    SourceError,
    TurboQuantError,
    UnsafeModelError,
    UnsupportedModelError,
)
from quant_engine.file_hash import file_sha256
from quant_engine.source import resolve
from tests.quant_engine.checkpoints import write_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_local_folder_is_found_with_its_config_and_tensors(tmp_path: Path) -> None:
    source = resolve(write_model(tmp_path / "small"))
    assert (source.name, source.repo, source.revision) == ("small", None, None)
    assert source.config["model_type"] == "llama"
    assert source.tensors["model.norm.weight"].shape == (128,)
    assert source.shards == (tmp_path / "small" / "model.safetensors",)
    assert source.size_bytes == (tmp_path / "small" / "model.safetensors").stat().st_size


def test_a_sharded_folder_has_all_its_shards_and_the_same_tensors(tmp_path: Path) -> None:
    one, three = resolve(write_model(tmp_path / "one")), resolve(str(write_model(tmp_path / "three", shards=3)))
    assert len(three.shards) == 3
    assert set(three.tensors) == set(one.tensors)


def test_the_content_hash_names_weights_and_config_not_the_place(tmp_path: Path) -> None:
    first, same = resolve(write_model(tmp_path / "a")), resolve(write_model(tmp_path / "b"))
    other = resolve(write_model(tmp_path / "c", vocab_size=97))
    assert first.content_sha256 == same.content_sha256 != other.content_sha256
    assert first.content_sha256 is not None and len(first.content_sha256) == 64
    assert first.origin() == {"name": "a", "revision": None, "content_sha256": first.content_sha256}


def test_a_files_hash_is_its_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert file_sha256(tmp_path / "x").startswith("ba7816bf8f01cfea")


def test_a_missing_folder_is_refused_with_names_like_it(tmp_path: Path) -> None:
    write_model(tmp_path / "tiny-llama")
    with pytest.raises(
        SourceError, match=r"no model at .*tiny-lama \(did you mean .*/tiny-llama\?\); give a folder, or"
    ):
        resolve(tmp_path / "tiny-lama")
    with pytest.raises(SourceError, match="there is no folder"):
        resolve(str(tmp_path / "nowhere" / "at" / "all"))


def test_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is a file; give the folder"):
        resolve(write_model(tmp_path / "a") / "config.json")


@pytest.mark.parametrize(
    ("files", "kind", "message"),
    [
        ([], SourceError, "is empty"),
        (["notes.txt"], SourceError, r"holds no model\*\.safetensors \(found notes.txt\)"),
        (["config.json", "pytorch_model.bin"], UnsafeModelError, "pytorch_model.bin, a format that can run code"),
        (["config.json", "weights.pt"], UnsafeModelError, "weights.pt"),
        (["config.json", "weights.pkl"], UnsafeModelError, "save_pretrained"),
        (["model.Q4_K_M.gguf"], UnsupportedModelError, "GGUF|quantized already for llama.cpp"),
        (["adapter_config.json", "adapter_model.safetensors"], SourceError, "an adapter, not a model; merge"),
        (["adapters.safetensors", "adapter_config.json"], SourceError, "mlx_lm.fuse"),
        (["config.json", "vae.safetensors"], SourceError, "has vae.safetensors but no model"),
        (["config.json", "model.safetensors.index.json"], CorruptCheckpointError, "none of its shards"),
        (["model.safetensors"], SourceError, "weights but no config.json"),
    ],
)
def test_folders_that_are_no_model_are_refused_with_what_they_are(
    tmp_path: Path, files: list[str], kind: type[TurboQuantError], message: str
) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(kind, match=message):
        resolve(tmp_path)


@pytest.mark.parametrize("key", ["auto_map", "model_file", "trust_remote_code"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_config_that_asks_for_code_is_refused(tmp_path: Path, key: str, file: str) -> None:
    write_model(tmp_path)
    held = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps(held | {key: "modeling_custom.Model"}))
    with pytest.raises(UnsafeModelError, match=rf"^{file} asks for code .*{key}: 'modeling_custom.Model'.*never done"):
        resolve(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (write_model(tmp_path) / "config.json").write_text(text)
    with pytest.raises(CorruptCheckpointError, match=r"config\.json .*download it again"):
        resolve(tmp_path)


def _edit_index(folder: Path, **weight_map: Any) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= weight_map
    path.write_text(json.dumps(index))


def test_an_index_that_lists_a_missing_shard_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CorruptCheckpointError, match=r"lists model-00002-of-00003\.safetensors, which is missing"):
        resolve(tmp_path)


def test_an_index_that_lists_a_tensor_elsewhere_is_refused(tmp_path: Path) -> None:
    _edit_index(write_model(tmp_path / "a", shards=2), **{"model.norm.weight": "model-00001-of-00002.safetensors"})
    _edit_index(tmp_path / "a", **{"model.embed_tokens.weight": "model-00002-of-00002.safetensors"})
    with pytest.raises(CorruptCheckpointError, match=r"says that tensor model\.\S+ is in .*, and it is not"):
        resolve(tmp_path / "a")


@pytest.mark.parametrize("name", ["../../etc/passwd.safetensors", "model.bin", 5])
def test_an_index_that_points_out_of_the_folder_is_refused(tmp_path: Path, name: Any) -> None:
    _edit_index(write_model(tmp_path, shards=2), **{"model.norm.weight": name})
    with pytest.raises(CorruptCheckpointError, match="it must be a safetensors file beside it"):
        resolve(tmp_path)


def test_an_index_without_a_map_is_refused(tmp_path: Path) -> None:
    (write_model(tmp_path, shards=2) / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(CorruptCheckpointError, match="has no weight_map"):
        resolve(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path)
    mx.save_safetensors(str(tmp_path / "model-2.safetensors"), {"model.norm.weight": mx.ones(128)})
    with pytest.raises(
        CorruptCheckpointError, match=r"tensor model\.norm\.weight is in model-2\.safetensors and in model"
    ):
        resolve(tmp_path)


def test_a_truncated_shard_is_refused(tmp_path: Path) -> None:
    shard = write_model(tmp_path) / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CorruptCheckpointError, match=r"model\.safetensors is damaged.*truncated"):
        resolve(tmp_path)


def test_a_converted_model_whose_tensors_are_not_those_it_states_is_refused(tmp_path: Path) -> None:
    convert(write_model(tmp_path / "in"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization"]["modules"]["model.layers.0.mlp.up_proj"]["group_size"] = 32
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CorruptCheckpointError, match=r"up_proj\.scales is F16 \[256, 2\]; config\.json says F16 \[256, 4\]"
    ):
        resolve(tmp_path / "out")


@pytest.mark.parametrize(("stated", "expected"), [('{"eos_token_id": [0, 7]}', [0, 7]), ("{}", 3), (None, 3)])
def test_generation_settings_name_the_end_of_text_before_the_config_does(
    tmp_path: Path, stated: str | None, expected: Any
) -> None:
    write_model(tmp_path, eos_token_id=3)
    (tmp_path / "generation_config.json").unlink()
    if stated:
        (tmp_path / "generation_config.json").write_text(stated)
    assert resolve(tmp_path).eos_token_id == expected


class Hub:
    """Stands in for huggingface_hub's functions: one repository, in a folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.asked: list[dict[str, Any]] = []
        self.failure: Exception | None = None
        self.download_failure: Exception | None = None
        self.names = [path.name for path in folder.iterdir()]
        monkeypatch.setattr(huggingface_hub, "model_info", self.model_info)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)

    def model_info(self, repo: str, *, revision: str | None, files_metadata: bool) -> Any:
        if self.failure:
            raise self.failure
        return SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename=n, size=1) for n in self.names])

    def snapshot_download(self, repo: str, **options: Any) -> str:
        self.asked.append({"repo": repo} | options)
        if self.download_failure:
            raise self.download_failure
        return str(self.folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.chdir(tmp_path)
    return Hub(write_model(tmp_path / "snapshots" / COMMIT), monkeypatch)


def _http(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, "401 Client Error")
    return error


def test_a_repository_is_fetched_at_a_pinned_commit_without_code(hub: Hub) -> None:
    said: list[str] = []
    source = resolve("owner/name", progress=lambda done, total, message: said.append(message))
    assert (source.name, source.repo, source.revision) == ("owner/name", "owner/name", COMMIT)
    assert source.content_sha256 is None
    assert hub.asked[0]["revision"] == COMMIT
    allowed = hub.asked[0]["allow_patterns"]
    for file in (
        "tokenizer.py",
        "tokenizer_custom.py",
        "modeling_x.py",
        "model.bin",
        "model.py",
        "vocab.pkl",
        "a/b.py",
    ):
        assert not any(fnmatch.fnmatch(file, pattern) for pattern in allowed)
    assert any(fnmatch.fnmatch("model-00001-of-00002.safetensors", pattern) for pattern in allowed)
    assert said == [f"downloading owner/name at {COMMIT[:12]}", "downloaded owner/name"]


def test_a_repository_of_pickles_is_refused_before_it_is_fetched(hub: Hub) -> None:
    hub.names = ["config.json", "pytorch_model.bin"]
    with pytest.raises(UnsafeModelError, match=r"^owner/name has its weights in pytorch_model\.bin"):
        resolve("owner/name")
    assert hub.asked == []


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (_http(RepositoryNotFoundError), "no repository owner/name on the Hub, or it is private"),
        (_http(GatedRepoError), "needs its licence accepted"),
        (_http(RevisionNotFoundError), "owner/name has no revision 'v9'"),
        (_http(HfHubHTTPError), "the Hub answered for owner/name: .*try again later"),
        (HFValidationError("too long"), "is no repository name"),
    ],
)
def test_what_the_hub_refuses_is_said_in_words(hub: Hub, failure: Exception, message: str) -> None:
    hub.failure = failure
    with pytest.raises(SourceError, match=message):
        resolve("owner/name", revision="v9")


@pytest.mark.parametrize("failure", [OSError("no route"), OfflineModeIsEnabled("offline"), TimeoutError("slow")])
def test_without_network_the_copy_in_the_cache_is_used_and_said(hub: Hub, failure: Exception) -> None:
    hub.failure = failure
    said: list[str] = []
    source = resolve("owner/name", progress=lambda done, total, message: said.append(message))
    assert source.revision == COMMIT
    assert hub.asked[0]["local_files_only"] is True
    assert said == ["no network: using the copy of owner/name downloaded before"]


def test_without_network_and_copy_the_way_out_is_named(hub: Hub) -> None:
    hub.failure, hub.download_failure = OSError("no route"), _http(LocalEntryNotFoundError)
    with pytest.raises(
        SourceError, match=r"no folder owner/name.*cannot be reached \(no route\); connect, .*path of a folder"
    ):
        resolve("owner/name")


def test_without_network_a_copy_without_weights_is_said_to_be_that(hub: Hub) -> None:
    hub.failure = OSError("no route")
    (hub.folder / "model.safetensors").unlink()
    with pytest.raises(
        SourceError, match=r"copy of owner/name on this machine is not whole .*cannot be reached \(no route\); connect"
    ):
        resolve("owner/name")


def test_a_download_that_breaks_says_that_it_can_continue(hub: Hub) -> None:
    hub.download_failure = OSError("reset by peer")
    with pytest.raises(SourceError, match="stopped: reset by peer; run it again, it continues"):
        resolve("owner/name")


def test_errors_of_the_http_client_count_as_no_network(hub: Hub) -> None:
    hub.failure, hub.download_failure = type("TransportError", (Exception,), {})("dns"), _http(LocalEntryNotFoundError)
    with pytest.raises(SourceError, match=r"cannot be reached \(dns\)"):
        resolve("owner/name")


def test_a_programming_error_is_not_taken_for_a_missing_network(hub: Hub) -> None:
    hub.failure = ZeroDivisionError("bug")
    with pytest.raises(ZeroDivisionError):
        resolve("owner/name")
