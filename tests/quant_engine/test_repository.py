"""A repository at one commit: what huggingface_hub's client gets from a hub on this machine."""

from collections.abc import Generator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError

from quant_engine.errors import SourceError
from quant_engine.repository import Repository
from quant_engine.safetensors_file import read_header
from tests.quant_engine.checkpoints import write_model
from tests.quant_engine.local_hub import COMMIT, REPOSITORY, LocalHub, local_hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[LocalHub]:
    with local_hub(write_model(tmp_path / "repository", shards=3)) as hub:
        hub.use(monkeypatch, tmp_path / "cache")
        yield hub


def test_it_is_found_at_the_commit_that_a_revision_stands_for_with_sizes(hub: LocalHub) -> None:
    found = Repository.find(REPOSITORY, "main")
    assert (found.name, found.commit) == (REPOSITORY, COMMIT)
    assert found.sizes == {path.name: path.stat().st_size for path in hub.folder.iterdir()}


def test_headers_are_those_of_the_files_without_their_data(hub: LocalHub) -> None:
    files = [name for name in hub.names() if name.endswith(".safetensors")]
    found = Repository.find(REPOSITORY, None).headers(files, hub.folder)
    assert found == {file: read_header(hub.folder / file) for file in files}
    assert hub.fetched == []


@pytest.mark.parametrize("into_cache", [False, True])
def test_a_file_is_fetched_once_and_its_bytes_are_told(hub: LocalHub, tmp_path: Path, into_cache: bool) -> None:
    file = "model-00001-of-00003.safetensors"
    told: list[tuple[int, int, str]] = []
    folder = None if into_cache else tmp_path / "here"
    for _ in range(2):
        path = Repository.find(REPOSITORY, None).fetch(file, folder, lambda *tick: told.append(tick))
        assert path.read_bytes() == (hub.folder / file).read_bytes()
        assert path.is_relative_to(folder or tmp_path / "cache")
    assert hub.fetched == [file]
    size = (hub.folder / file).stat().st_size
    assert told == [(size, size, file)]


def test_a_licence_that_was_not_accepted_is_named_as_the_reason(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def gated(*_: Any, **__: Any) -> str:
        raise GatedRepoError.__new__(GatedRepoError)

    found = Repository.find(REPOSITORY, None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", gated)
    with pytest.raises(SourceError, match=r"owner/name needs its licence accepted on its page, then `hf auth login`"):
        found.download(["config.json"])
