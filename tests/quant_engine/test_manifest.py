import json
from typing import Any

import pytest

from quant_engine.codebook import lloyd_max
from quant_engine.config import QuantConfig
from quant_engine.errors import CorruptCheckpointError, UnsupportedModelError
from quant_engine.manifest import Manifest, ModuleEntry

PATH = "model.layers.0.mlp.up_proj"
ENTRY = ModuleEntry(3, 64, 128, (256, 128))
ORIGIN: dict[str, str | None] = {"name": "made", "revision": None, "content_sha256": "ab"}


def _manifest(entry: ModuleEntry = ENTRY) -> Manifest:
    return Manifest.of(QuantConfig(seed=5), {PATH: entry}, {"lm_head": "output projection"}, ORIGIN)


def _config(**changes: Any) -> dict[str, Any]:
    return {"model_type": "llama", "quantization": _manifest().to_dict() | changes}


def test_a_manifest_survives_json() -> None:
    written = json.loads(json.dumps({"quantization": _manifest().to_dict()}))
    assert Manifest.from_config(written) == _manifest()


def test_the_block_states_all_that_loading_needs() -> None:
    block = _manifest().to_dict()
    assert (block["quant_method"], block["format_version"], block["code"], block["seed"]) == (
        "turboquant",
        3,
        "lloyd_max",
        5,
    )
    assert block["codebooks"] == {"3": list(lloyd_max(3))}
    assert block["modules"] == {PATH: {"bits": 3, "group_size": 64, "block": 128, "shape": [256, 128], "qjl": False}}
    assert block["excluded"] == {"lm_head": "output projection"}
    assert block["source"] == ORIGIN
    assert set(block["tool"]) == {"tq-mcp", "mlx"}


def test_codebooks_are_those_of_the_file_not_of_this_version() -> None:
    values = [-2.0, -1.5, -1.0, -0.5, 0.5, 1.0, 1.5, 2.0]
    read = Manifest.from_config(_config(codebooks={"3": values}))
    assert read is not None
    assert read.codebook(3) == tuple(values)
    assert read.seed == 5


@pytest.mark.parametrize("config", [{}, {"quantization": {"bits": 4, "group_size": 64}}, {"quantization": "fp8"}])
def test_other_models_have_no_manifest(config: dict[str, Any]) -> None:
    assert Manifest.from_config(config) is None


@pytest.mark.parametrize(
    ("version", "absent"), [(1, ("fold_rotation", "stream_block", "groups_for")), (2, ("groups_for",))]
)
def test_older_blocks_are_read_as_those_of_models_without_what_came_later(version: int, absent: tuple[str]) -> None:
    config = _config(format_version=version)
    for name in absent:
        del config["quantization"][name]
    assert Manifest.from_config(config) == _manifest()


def test_a_newer_format_is_refused_with_the_way_to_update() -> None:
    with pytest.raises(UnsupportedModelError, match=r"format_version 4 and this tq-mcp reads up to 3; .*--upgrade"):
        Manifest.from_config(_config(format_version=4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": None}, "format_version None"),
        ({"format_version": 0}, "format_version 0"),
        ({"colour": "red"}, "unknown 'colour'"),
        ({"bits": 9}, "bits is 9"),
        ({"stream_block": 0}, "stream_block is 0"),
        ({"fold_rotation": "yes"}, "fold_rotation is 'yes'"),
        ({"codebooks": {"2": [1, 2, 3, 4]}}, "no codebook of 8 values"),
        ({"codebooks": {"3": [1.0, 2.0]}}, "no codebook of 8 values"),
        ({"codebooks": 3}, "cannot be read"),
        ({"modules": {PATH: {"bits": 3}}}, "missing 'block', missing 'group_size'"),
        ({"modules": {PATH: ENTRY.__dict__ | {"shape": [256]}}}, "cannot be read"),
        ({"modules": {PATH: ENTRY.__dict__ | {"shape": [256, 100]}}}, "cannot be read"),
        ({"modules": {PATH: ENTRY.__dict__ | {"bits": "3"}}}, "cannot be read"),
        ({"modules": {PATH: ENTRY.__dict__ | {"group_size": 48}}}, "groups of 48 in a width of 128"),
        ({"modules": {PATH: ENTRY.__dict__ | {"scale": 1}}}, "unknown 'scale'"),
    ],
)
def test_a_block_that_is_not_whole_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CorruptCheckpointError, match=message):
        Manifest.from_config(_config(**changes))


def test_a_missing_key_is_refused_by_name() -> None:
    config = _config()
    del config["quantization"]["seed"]
    with pytest.raises(CorruptCheckpointError, match="missing 'seed'"):
        Manifest.from_config(config)


def _tensors(entry: ModuleEntry) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {f"{PATH}.{part}": stated for part, stated in entry.tensors().items()}


@pytest.mark.parametrize("qjl", [False, True])
def test_files_that_hold_what_is_stated_pass(qjl: bool) -> None:
    entry = ModuleEntry(3, 64, 128, (256, 128), qjl)
    tensors = _tensors(entry)
    assert tensors[f"{PATH}.weight"] == ("U32", (256, 12))
    assert tensors[f"{PATH}.scales"] == ("F16", (256, 2))
    assert len(tensors) == (4 if qjl else 2)
    _manifest(entry).check_tensors(tensors)


def test_one_scale_a_row_is_stated_as_such() -> None:
    assert ModuleEntry(2, 0, 128, (256, 128)).tensors()["scales"] == ("F16", (256, 1))


@pytest.mark.parametrize(
    ("part", "found", "message"),
    [
        ("weight", None, "weight is missing"),
        ("weight", ("U32", (256, 16)), r"weight is U32 \[256, 16\]; .* U32 \[256, 12\]"),
        ("scales", ("F32", (256, 2)), r"scales is F32"),
    ],
)
def test_files_that_hold_something_else_are_refused(
    part: str, found: tuple[str, tuple[int, ...]] | None, message: str
) -> None:
    tensors = _tensors(ENTRY)
    del tensors[f"{PATH}.{part}"]
    if found:
        tensors[f"{PATH}.{part}"] = found
    with pytest.raises(CorruptCheckpointError, match=message):
        _manifest().check_tensors(tensors)
