"""Locks between processes and threads."""

import os
from pathlib import Path

import pytest

from registry import RegistryError
from registry.lock import locked, try_lock


def test_a_lock_is_held_once_and_freed_at_the_end(tmp_path: Path) -> None:
    with locked(tmp_path / "lock"):
        assert try_lock(tmp_path / "lock") is None
    held = try_lock(tmp_path / "lock")
    assert held is not None
    os.close(held)


def test_waiting_ends_with_a_name(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "lock"),
        pytest.raises(RegistryError, match=r"Another process has held .*lock"),
        locked(tmp_path / "lock", timeout_s=0.05),
    ):
        pass


def test_an_exception_frees_it(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "lock"):
        raise ZeroDivisionError
    with locked(tmp_path / "lock", timeout_s=0.05):
        pass
