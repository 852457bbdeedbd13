"""The small model in the package is what its card says."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from examples.write_model_card import fill

LIMIT_BYTES = 8_000_000


def tensors(model: Path) -> dict[str, Any]:
    with (model / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


@pytest.fixture
def record(demo_model: Path) -> dict[str, Any]:
    return json.loads((demo_model / "training.json").read_text())


def test_it_is_a_llama_with_heads_of_64_and_tied_embeddings(demo_model: Path) -> None:
    config = json.loads((demo_model / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["head_dim"] == 64
    assert config["tie_word_embeddings"] is True


def test_its_weights_are_bfloat16(demo_model: Path) -> None:
    assert {entry["dtype"] for entry in tensors(demo_model).values()} == {"BF16"}


def test_it_fits_in_a_package(demo_model: Path) -> None:
    assert sum(path.stat().st_size for path in demo_model.iterdir() if path.is_file()) <= LIMIT_BYTES


def test_it_brings_its_own_tokenizer(demo_model: Path) -> None:
    tokenizer = json.loads((demo_model / "tokenizer.json").read_text())
    config = json.loads((demo_model / "config.json").read_text())
    assert len(tokenizer["model"]["vocab"]) == config["vocab_size"]


def test_it_has_the_parameters_that_were_trained(demo_model: Path, record: dict[str, Any]) -> None:
    sizes = [entry["data_offsets"][1] - entry["data_offsets"][0] for entry in tensors(demo_model).values()]
    assert sum(sizes) // 2 == record["parameters"]


def test_it_was_trained_to_the_end(record: dict[str, Any]) -> None:
    assert record["steps"] == record["steps_planned"]
    assert record["tokens_seen"] >= 10 * record["train_tokens"]


def test_its_card_holds_the_figures_of_its_training(demo_model: Path, record: dict[str, Any]) -> None:
    card = (demo_model / "README.md").read_text()
    assert fill(card, record) == card, "run examples/write_model_card.py"


def test_a_card_without_markers_is_refused(record: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="training:begin"):
        fill("no markers", record)
