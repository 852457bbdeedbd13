import json
from pathlib import Path
from typing import Any

import pytest

from tq_mcp import doctor
from tq_mcp.cli import main
from tq_mcp.settings import Settings


def test_a_sound_installation_has_no_problems(converted_home: Path) -> None:
    found = doctor.diagnose(Settings(converted_home))
    assert found.problems == [] or [p.what for p in found.problems] == ["the package tq-mcp is not installed"]
    assert found.registered_models == 1 and found.device and found.backend and found.mlx


def test_it_makes_no_home(tmp_path: Path) -> None:
    found = doctor.diagnose(Settings(tmp_path / "none"))
    assert "none yet" in found.registry and not (tmp_path / "none").exists()


def test_a_missing_package_comes_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "numba" else version(name))
    found = doctor.diagnose(Settings(tmp_path))
    assert found.numba is None
    assert next(p.remedy for p in found.problems if "numba" in p.what).startswith("pip install 'numba")


def test_a_broken_mlx_is_told_and_not_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    importer = doctor.importlib.import_module

    def broken(name: str) -> Any:
        if name == "metal_kernels":
            raise ImportError("libmlx.so: cannot open shared object file")
        return importer(name)

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    found = doctor.diagnose(Settings(tmp_path))
    assert found.device is None
    assert any("libmlx.so" in p.what and "mlx" in p.remedy for p in found.problems)


def test_a_gpu_that_is_not_used_is_told_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "has_nvidia_gpu", lambda: True)
    remedies = [p.remedy for p in doctor.diagnose(Settings(tmp_path)).problems]
    assert "pip uninstall -y mlx-cpu && pip install 'mlx[cuda13]'" in remedies


def test_little_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LITTLE_DISK_BYTES", 10**18)
    assert any("free where" in p.what for p in doctor.diagnose(Settings(tmp_path)).problems)


def test_a_registry_that_cannot_be_opened_is_told(tmp_path: Path) -> None:
    (tmp_path / "registry.sqlite").write_text("not a database, but long enough to be taken for a damaged one" * 20)
    found = doctor.diagnose(Settings(tmp_path))
    assert found.registry == "cannot be opened" and found.registered_models is None
    assert found.problems


def test_the_command_prints_both_ways(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code = main(["doctor", "--json", "--home", str(tmp_path)])
    assert json.loads(capsys.readouterr().out)["home"] == str(tmp_path)
    assert main(["doctor", "--home", str(tmp_path)]) == code
    assert "platform" in capsys.readouterr().out
