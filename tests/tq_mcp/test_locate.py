from collections.abc import Iterator
from pathlib import Path

import pytest

from quant_engine.errors import InputError, SourceError
from registry import Registry, open_registry
from tests.tq_mcp.conftest import NAME
from tq_mcp.locate import locate


@pytest.fixture
def registry(home: Path) -> Iterator[Registry]:
    with open_registry(home) as opened:
        yield opened


def test_a_registry_name_comes_first(
    registry: Registry, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / NAME).mkdir()
    monkeypatch.chdir(tmp_path)
    found = locate(registry, NAME)
    assert found.ref == home / "models" / NAME and found.model is not None


def test_an_alias_is_as_good_as_a_name(registry: Registry) -> None:
    registry.set_alias("best", NAME)
    assert locate(registry, "best").name == NAME


def test_a_folder_is_taken_where_no_model_has_the_name(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    found = locate(registry, "folder")
    assert (found.ref, found.name, found.model) == (tmp_path / "folder", "folder", None)


def test_the_folder_of_a_registered_model_is_recognized(registry: Registry, home: Path) -> None:
    found = locate(registry, str(home / "models" / NAME))
    assert found.model is not None and found.model.name == NAME


def test_a_repository_is_left_to_the_engine(registry: Registry) -> None:
    found = locate(registry, "owner/name")
    assert (found.ref, found.name, found.model) == ("owner/name", "owner/name", None)


def test_a_path_that_is_missing_is_left_to_the_engine_to_explain(registry: Registry) -> None:
    assert locate(registry, "/nowhere/model").ref == Path("/nowhere/model")


def test_an_unknown_name_is_answered_with_the_nearest(registry: Registry) -> None:
    with pytest.raises(SourceError, match=rf"(?s)smal.*Nearest: {NAME}.*owner/name"):
        locate(registry, "smal")


@pytest.mark.parametrize("path", ["~nobody-of-this-name/model", "/" + "x" * 300])
def test_what_cannot_be_a_path_is_explained(registry: Registry, path: str) -> None:
    with pytest.raises(SourceError, match="cannot be a folder"):
        locate(registry, path)


def test_a_revision_belongs_to_repositories_only(registry: Registry) -> None:
    assert locate(registry, "owner/name", "main").ref == "owner/name"
    with pytest.raises(InputError, match="revision is 'main'"):
        locate(registry, NAME, "main")
