"""Repositories that are converted and registered, by huggingface_hub's own client from a hub on this machine."""

import os
from collections.abc import Generator
from pathlib import Path

import huggingface_hub
import pytest

from quant_engine.config import QuantConfig
from quant_engine.errors import DownloadError
from quant_engine.file_hash import file_sha256
from tests.quant_engine.checkpoints import split, write_model
from tests.quant_engine.local_hub import COMMIT, REPOSITORY, LocalHub, local_hub
from tq_mcp.errors import explain
from tq_mcp.services import Services, open_services
from tq_mcp.settings import Settings


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[LocalHub]:
    with local_hub(split(write_model(tmp_path / "repository", num_hidden_layers=4), 3)) as hub:
        hub.use(monkeypatch, tmp_path / "cache")
        yield hub


@pytest.fixture
def services(tmp_path: Path) -> Generator[Services]:
    with open_services(Settings(tmp_path / "home")) as services:
        yield services


def test_commit_size_and_files_are_registered(hub: LocalHub, services: Services, tmp_path: Path) -> None:
    made = services.convert(REPOSITORY, recipe=QuantConfig(), name="small")
    found = services.get_model("small")
    assert (made.source, made.source_revision, found.source_revision) == (REPOSITORY, COMMIT, COMMIT)
    assert found.source_size_bytes == sum(path.stat().st_size for path in hub.folder.glob("*.safetensors"))
    assert {file.path for file in found.files} == set(os.listdir(found.path))
    for file in found.files:
        assert file_sha256(Path(found.path) / file.path) == file.sha256
    assert not list((tmp_path / "cache").rglob("model-*.safetensors"))


def test_weights_can_be_kept_for_a_comparison(hub: LocalHub, services: Services, tmp_path: Path) -> None:
    services.convert(REPOSITORY, recipe=QuantConfig(), name="small", keep_source=True)
    assert len(list((tmp_path / "cache").rglob("snapshots/*/model-*.safetensors"))) == 3


@pytest.mark.parametrize("outside", [False, True])
def test_what_a_lost_network_stopped_is_not_registered_and_goes_on(
    hub: LocalHub, services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outside: bool
) -> None:
    place = tmp_path / "outside" / "small" if outside else None
    download = huggingface_hub.hf_hub_download

    def lose(repo: str, file: str, **options: object) -> str:
        if file.startswith("model-00003"):
            raise OSError("connection reset")
        return download(repo, file, **options)  # pyright: ignore

    with monkeypatch.context() as patch, pytest.raises(DownloadError) as raised:
        patch.setattr(huggingface_hub, "hf_hub_download", lose)
        services.convert(REPOSITORY, recipe=QuantConfig(), name="small", output=place)
    assert explain(raised.value).endswith("call the same tool with the same arguments again, it goes on from where it "
                                          "stopped.")  # fmt: skip
    assert services.list_models().total == 0 and not (place and place.exists())
    hub.fetched.clear()
    services.convert(REPOSITORY, recipe=QuantConfig(), name="small", output=place)
    assert services.list_models().total == 1
    left = [path for path in tmp_path.rglob("*") if "partial" in path.name or path.name.startswith(".tq-staging")]
    assert left == []
