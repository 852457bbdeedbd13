"""Data and models that tests share. What a machine lacks is skipped by name, never silently."""

from pathlib import Path

import mlx.core as mx
import pytest

from tq_mcp import demo_model as packaged_demo_model

# Also beside a GPU: what tests it says so itself.
mx.set_default_device(mx.cpu)
ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


def _shared_folder(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"../shared/{name} is not on this machine")
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of evaluation texts and vectors beside the checkout."""
    return _shared_folder("data")


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """The folder of trained models beside the checkout."""
    return _shared_folder("models")


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The small trained model that ships in the package. Read it, never write there."""
    return packaged_demo_model.path()


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout's root."""
    return ROOT


@pytest.fixture(autouse=True)
def _private_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every test, and every process it starts, out of the user's own registry and off the network."""
    monkeypatch.setenv("TQ_HOME", str(tmp_path / "tq-home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
