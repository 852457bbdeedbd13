"""A fresh registry for each test, and models of a few bytes to put into it."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from registry import EvaluationRecord, Model, ModelRecord, Registry, open_registry

FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": bytes(range(256)) * 20,
    "a/b.txt": b"x",
}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture(scope="session")
def empty_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once and copied, which takes less time than to migrate again."""
    home = tmp_path_factory.mktemp("empty") / "home"
    open_registry(home).close()
    return home


@pytest.fixture
def registry(home: Path, empty_home: Path) -> Iterator[Registry]:
    shutil.copytree(empty_home, home)
    with open_registry(home) as opened:
        yield opened


@pytest.fixture(scope="session")
def record() -> Callable[..., ModelRecord]:
    """Makes records that differ from a plain one in the fields given."""

    def make(name: str = "tiny-tq3", **changes: Any) -> ModelRecord:
        plain: dict[str, Any] = {
            "name": name,
            "source": "org/tiny",
            "source_sha256": "a" * 64,
            "architecture": "llama",
            "parameters": 1000,
            "bits_per_weight": 3.25,
            "bits": 3,
            "recipe": {"bits": 3, "group_size": 64},
            "versions": {"tq-mcp": "0.1.0"},
        }
        return ModelRecord(**{**plain, **changes})

    return make


@pytest.fixture(scope="session")
def fill() -> Callable[..., Path]:
    """Writes a model's files into a folder that does not exist yet."""

    def write(folder: Path, files: dict[str, bytes] = FILES) -> Path:
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return folder

    return write


@pytest.fixture
def publish(registry: Registry, record: Callable[..., ModelRecord], fill: Callable[..., Path]) -> Callable[..., Model]:
    """Publishes a small model by name, in the way that callers do."""

    def make(name: str = "tiny-tq3", final: Path | None = None, **changes: Any) -> Model:
        with registry.staging(name, final) as staging:
            return registry.publish(record(name, **changes), fill(staging), final)

    return make


@pytest.fixture(scope="session")
def evaluation() -> Callable[..., EvaluationRecord]:
    def make(ppl: float = 20.0, **changes: Any) -> EvaluationRecord:
        plain: dict[str, Any] = {
            "dataset": "wiki",
            "dataset_sha256": "d" * 64,
            "method": "turboquant",
            "windows": 4,
            "seq_len": 128,
            "tokens": 512,
        }
        return EvaluationRecord(ppl=ppl, **{**plain, **changes})

    return make
