from pathlib import Path

import pytest

from tq_mcp.settings import Settings, child_environment


def test_a_home_that_is_given_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TQ_HOME", "/elsewhere")
    assert Settings.read(tmp_path).home == tmp_path


def test_the_environment_names_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQ_HOME", "/elsewhere")
    assert Settings.read().home == Path("/elsewhere")


def test_without_either_the_home_is_in_the_users_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TQ_HOME")
    assert Settings.read().home == Path.home() / ".tq-mcp"


def test_a_relative_home_becomes_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert Settings.read("here").home == tmp_path / "here"


def test_a_child_gets_this_environment_with_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT", "1")
    changed = child_environment(TQ_HOME="/other")
    assert (changed["KEPT"], changed["TQ_HOME"]) == ("1", "/other")
