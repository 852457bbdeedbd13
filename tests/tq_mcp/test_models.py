"""Whether registered models are as they were made, uploading and removing them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tq_mcp.services
from quant_engine.errors import OutputError
from registry import RegistryError
from tests.tq_mcp.conftest import NAME
from tq_mcp.cli import main
from tq_mcp.services import Services, open_services
from tq_mcp.settings import Settings


@pytest.fixture
def services(home: Path) -> Iterator[Services]:
    with open_services(Settings(home)) as opened:
        yield opened


@pytest.fixture
def folder(services: Services) -> Path:
    return Path(services.get_model(NAME).path)


class TestVerify:
    def test_a_model_is_intact_until_a_byte_changes(self, services: Services, folder: Path) -> None:
        ticks = list[tuple[int, int]]()
        found = services.verify_model(NAME, lambda *tick: ticks.append(tick[:2]))
        assert found.intact and not found.problems and ticks[-1][0] == ticks[-1][1] == found.bytes_checked
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
        (folder / "notes.txt").write_text("mine")
        found = services.verify_model(NAME)
        assert not found.intact
        assert {(p.kind, p.path) for p in found.problems} == {("changed", weights.name), ("foreign", "notes.txt")}

    def test_the_command_says_so_in_words(self, home: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["models", "verify", NAME, "--home", str(home)]) == 0
        assert f"{NAME} is intact" in capsys.readouterr().out
        (folder / "config.json").unlink()
        main(["models", "verify", NAME, "--home", str(home)])
        shown = capsys.readouterr().out
        assert "is not what was registered" in shown and "missing" in shown


class TestRemove:
    def test_a_dry_run_removes_nothing_and_then_the_name_is_free(self, services: Services, folder: Path) -> None:
        assert services.remove_model(NAME).dry_run and folder.exists()
        services.remove_model(NAME, dry_run=False)
        assert not folder.exists()
        with pytest.raises(RegistryError, match="no model"):
            services.get_model(NAME)

    def test_files_that_are_not_the_models_are_kept_unless_forced(self, services: Services, folder: Path) -> None:
        (folder / "notes.txt").write_text("mine")
        with pytest.raises(RegistryError, match=r"notes\.txt"):
            services.remove_model(NAME, dry_run=False)
        assert (folder / "notes.txt").exists()
        services.remove_model(NAME, dry_run=False, force=True)
        assert not folder.exists()

    def test_a_model_whose_folder_is_gone_or_a_link(self, services: Services, folder: Path, tmp_path: Path) -> None:
        elsewhere = folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(elsewhere)
        services.remove_model(NAME, dry_run=False)
        assert not folder.is_symlink() and (elsewhere / "config.json").exists()
        assert services.list_models().total == 0


class TestPush:
    def test_a_dry_run_shows_the_card_and_uploads_nothing(
        self, services: Services, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tq_mcp.services.hub, "upload", lambda *_, **__: pytest.fail("it uploaded"))
        shown = services.push(NAME, "owner/name")
        assert (shown.dry_run, shown.url) == (True, None)
        assert "model.safetensors" in shown.files and "README.md" not in shown.files
        assert shown.card.startswith("---")

    def test_only_the_models_own_files_go(
        self, services: Services, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def upload(_: Path, files: list[str], card: str, repo: str, *, private: bool) -> str:
            assert ".env" not in files and "config.json" in files
            return f"{repo} {private}"

        (folder / ".env").write_text("SECRET=1")
        monkeypatch.setattr(tq_mcp.services.hub, "upload", upload)
        assert services.push(NAME, "owner/name", dry_run=False, private=True).url == "owner/name True"

    @pytest.mark.parametrize("harm", [lambda file: file.unlink(), lambda file: file.write_text("{}")])
    def test_a_damaged_model_is_not_uploaded(self, services: Services, folder: Path, harm: Any) -> None:
        harm(folder / "config.json")
        with pytest.raises(OutputError, match=r"is not what was registered \(config\.json (missing|changed)\)"):
            services.push(NAME, "owner/name")

    def test_a_model_that_is_not_registered_is_refused(self, services: Services) -> None:
        with pytest.raises(RegistryError, match="no model 'nothing'"):
            services.push("nothing", "owner/name")
