"""Folded parameters are read in pieces from the files that they need, and say so."""

import sys
from pathlib import Path

import pytest

from quant_engine.config import QuantConfig
from quant_engine.convert import convert
from quant_engine.folded_parameters import FoldedParameters, parameters_of
from quant_engine.parameters import Parameters
from quant_engine.source import Source, resolve
from tests.quant_engine.checkpoints import CONFIG, write_model

FOLDED = QuantConfig(fold_rotation=True)
LAYER = "model.layers.0"


def parameters(source: Source) -> Parameters:
    return parameters_of(source.config, source.tensors, FOLDED)


def test_only_a_recipe_that_says_so_folds(tmp_path: Path) -> None:
    source = resolve(write_model(tmp_path))
    assert isinstance(parameters(source), FoldedParameters)
    assert type(parameters_of(source.config, source.tensors, QuantConfig())) is Parameters


def test_names_shapes_and_dtypes_stay_and_nothing_folded_counts_as_stored(tmp_path: Path) -> None:
    source = resolve(write_model(tmp_path, tie_word_embeddings=True))
    plain, folded = Parameters(source.config, source.tensors), parameters(source)
    assert {n: (p.dtype, p.shape, p.nbytes) for n, p in plain.items()} == {
        n: (p.dtype, p.shape, p.nbytes) for n, p in folded.items()
    }
    assert {n for n, p in folded.items() if p.stored} == {"model.embed_tokens.weight", "model.norm.weight"}
    rotated = {name.split(".")[-2] for name, parameter in folded.items() if parameter.rotated}
    assert rotated == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    assert (plain.stream_block, folded.stream_block) == (1, 128)


def test_a_reader_needs_the_file_of_its_norm(tmp_path: Path) -> None:
    source = resolve(write_model(tmp_path, shards=5))
    folded = parameters(source)
    for reader, norm in ((f"{LAYER}.self_attn.q_proj", f"{LAYER}.input_layernorm"), ("lm_head", "model.norm")):
        expected = {source.tensors[f"{name}.weight"].path for name in (reader, norm)}
        assert folded[f"{reader}.weight"].files == expected and len(expected) == 2
    writer = f"{LAYER}.mlp.down_proj.weight"
    assert folded[writer].files == {source.tensors[writer].path}


def test_files_and_pieces_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = convert(write_model(tmp_path / "one" / "in"), tmp_path / "one" / "out", config=FOLDED)
    for module in ("quantizer", "turning"):
        monkeypatch.setattr(sys.modules[f"quant_engine.{module}"], "CHUNK_VALUES", 5000)
    pieces = convert(write_model(tmp_path / "five" / "in", shards=5), tmp_path / "five" / "out", config=FOLDED)
    assert whole.files[-3].name == pieces.files[-3].name == "model.safetensors"
    held = [resolve(made.path).tensors for made in (whole, pieces)]
    assert held[0].keys() == held[1].keys()
    for name, info in held[0].items():
        found = b"".join(chunk.tobytes() for chunk in held[1][name].chunks())
        assert b"".join(chunk.tobytes() for chunk in info.chunks()) == found, name


def test_the_largest_writer_counts_as_held_in_float32(tmp_path: Path) -> None:
    folded = parameters(resolve(write_model(tmp_path)))
    assert folded.working_bytes == 4 * CONFIG["hidden_size"] * CONFIG["intermediate_size"]
