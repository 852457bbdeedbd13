"""Models of turboquant-mlx: one that it wrote, and its format written here from its description."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from numpy.typing import NDArray

from quant_engine import mlx_lm_adapter as adapter
from quant_engine.convert import convert
from quant_engine.errors import CorruptCheckpointError, TurboQuantError, UnsupportedModelError
from quant_engine.evaluate import evaluate
from quant_engine.export import export
from quant_engine.generate import generate
from quant_engine.loader import load, load_source
from quant_engine.source import resolve
from quant_engine.text import load_text
from quant_engine.turboquant_mlx import block_of, take_layers
from tests.quant_engine.published import REFERENCES, TOKENS

MADE = REFERENCES / "turboquant_mlx"
BLOCK: dict[str, Any] = {"mode": "turboquant", "bits": 3, "group_size": 32, "rotation": "hadamard"}
CODEBOOKS = {
    1: [-0.7979, 0.7979],
    2: [-1.5104, -0.4528, 0.4528, 1.5104],
    3: [-2.152, -1.344, -0.756, -0.2451, 0.2451, 0.756, 1.344, 2.152],
    4: [float(v) for v in np.linspace(-2.7, 2.7, 16)],
    "ternary": [-1.224, 0.0, 1.224],
}
Tensors = dict[str, NDArray[Any]]


def numpy_weight(parts: Tensors, rotated: bool = True) -> NDArray[np.float64]:
    """The matrix (out, in) in float64 that a layer of their format stands for, in the domain of its own input."""
    codebook, signs = parts["codebook"].astype(np.float64), parts["signs"].astype(np.float64)
    width, words = signs.size, parts["weight"]
    if codebook.size == 3:
        codes = np.stack([words // 3**i % 3 for i in range(20)], -1)
    else:
        bits = codebook.size.bit_length() - 1
        codes = np.stack([words >> (i * bits) & (2**bits - 1) for i in range(32 // bits)], -1)
    values = codebook[codes.reshape(*words.shape[:-1], -1)[..., :width]]
    weight = values * np.repeat(parts["scales"].astype(np.float64), width // parts["scales"].shape[-1], -1)
    if "qjl_packed" in parts:
        bits = np.stack([parts["qjl_packed"] >> i & 1 for i in range(32)], -1).reshape(len(weight), width)
        norms = parts["qjl_norms"].astype(np.float64)[:, None]
        projected = (2.0 * bits - 1) @ blockwise(width) * parts["qjl_signs"].astype(np.float64)
        weight = weight + np.sqrt(np.pi / 2 / width) * norms * projected
    return weight @ blockwise(width) * signs if rotated else weight


def numpy_experts(parts: Tensors) -> NDArray[np.float64]:
    """The matrices (experts, out, in) of a mixture's layer."""
    each = zip(parts["weight"], parts["scales"], strict=True)
    return np.stack([numpy_weight(parts | {"weight": weight, "scales": scales}) for weight, scales in each])


def blockwise(width: int) -> NDArray[np.float64]:
    """The orthonormal, symmetric matrix of the largest Hadamard blocks of a width: 2^k, or 12 * 2^k as MLX has them."""
    block = max(m * 2**k for m in (1, 12) for k in range(12) if width % (m * 2**k) == 0)
    sylvester = np.ones((1, 1))
    while len(sylvester) < block / (12 if block % 3 == 0 else 1):
        sylvester = np.block([[sylvester, sylvester], [sylvester, -sylvester]])
    twelve = np.array(mx.hadamard_transform(mx.eye(12), scale=1.0)) if block % 3 == 0 else np.ones((1, 1))
    return np.kron(np.eye(width // block), np.kron(twelve, sylvester)) / np.sqrt(block)


def made_layer(kind: int | str, shape: tuple[int, ...], group_size: int = 32, qjl: bool = False) -> Tensors:
    """A layer of random codes in their format."""
    random = np.random.default_rng(7)
    *outs, width = shape
    codebook = np.array(CODEBOOKS[kind], np.float16)
    base, per_word = (3, 20) if kind == "ternary" else (codebook.size, 32 // int(kind))
    codes = random.integers(0, codebook.size, (*outs, -(-width // per_word) * per_word))
    codes[..., width:] = 0
    digits = codes.reshape(*outs, -1, per_word) * (base ** np.arange(per_word, dtype=np.uint64)).astype(np.uint64)
    parts = {
        "weight": digits.sum(-1).astype(np.uint32),
        "scales": random.uniform(0.01, 0.02, (*outs, width // group_size)).astype(np.float16),
        "codebook": codebook,
        "signs": random.choice(np.array([-1, 1], np.float16), width),
        "bias": random.normal(size=outs).astype(np.float16),
    }
    if qjl:
        parts["qjl_packed"] = random.integers(0, 2**32, (*outs, width // 32), np.uint32)
        parts["qjl_norms"] = random.uniform(0.01, 0.02, outs).astype(np.float16)
        parts["qjl_signs"] = random.choice(np.array([-1, 1], np.float16), width)
    return parts


def taken(parts: Tensors, shape: tuple[int, ...], **settings: Any) -> nn.Module:
    tensors = {f"layer.{name}": mx.array(part) for name, part in parts.items()}
    (layer,) = take_layers(BLOCK | settings, {"layer": shape}, tensors).values()
    assert not tensors
    return layer


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MADE, tmp_path / "model"))


def edit(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization"] = config.get("quantization", {}) | settings
    (folder / "config.json").write_text(json.dumps(config))


def logits(folder: Path) -> NDArray[np.float32]:
    return np.array(load_source(resolve(folder))(mx.array([TOKENS]))[0].astype(mx.float32))


def test_a_model_that_it_wrote_gives_the_logits_that_it_computes() -> None:
    expected = np.load(MADE / "logits.npy")
    # It multiplies in float16 what is exact here: 5e-4 of each of some ten products.
    assert np.abs(logits(MADE) - expected).max() < 5e-3 * np.abs(expected).max()


def decoded_by_numpy(folder: Path) -> dict[str, mx.array]:
    """All parameters of a model of theirs in float32."""
    tensors = mx.load(str(folder / "model.safetensors"))
    for path in [name.removesuffix(".codebook") for name in tensors if name.endswith(".codebook")]:
        names = [name for name in tensors if name.startswith(f"{path}.")]
        parts = {name.removeprefix(f"{path}."): np.array(tensors.pop(name)) for name in names}
        weight = numpy_experts(parts) if parts["weight"].ndim == 3 else numpy_weight(parts)
        tensors[f"{path}.weight"] = mx.array(weight)
    floats = {n: a if a.dtype == mx.uint32 else a.astype(mx.float32) for n, a in tensors.items()}
    embedding = [floats.pop(f"model.embed_tokens.{part}") for part in ("weight", "scales", "biases")]
    return floats | {"model.embed_tokens.weight": mx.dequantize(*embedding, group_size=32, bits=4)}


def test_a_model_that_it_wrote_gives_the_logits_of_its_weights_decoded_by_numpy() -> None:
    model = adapter.build(json.loads((MADE / "config.json").read_text()))
    adapter.set_parameters(model, decoded_by_numpy(MADE))
    expected = np.array(model(mx.array([TOKENS]))[0])
    assert np.abs(logits(MADE) - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("kind", list(CODEBOOKS))
@pytest.mark.parametrize(("width", "group_size"), [(128, 64), (288, 32), (384, 128)])
def test_a_layer_multiplies_by_what_numpy_decodes(kind: int | str, width: int, group_size: int) -> None:
    for qjl, rotation in itertools.product((False, True), ("hadamard", "blockwise_hadamard")):
        parts = made_layer(kind, (40, width), group_size, qjl)
        x = np.random.default_rng(1).normal(size=(5, width))
        expected = x @ numpy_weight(parts).T + parts["bias"]
        y = np.array(taken(parts, (40, width), rotation=rotation)(mx.array(x.astype(np.float32))))
        assert np.abs(y - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("kind", list(CODEBOOKS))
def test_experts_multiply_by_what_numpy_decodes(kind: int | str) -> None:
    parts = made_layer(kind, (4, 40, 96))
    x, chosen = np.random.default_rng(1).normal(size=(5, 1, 1, 96)), np.array([[0, 3], [1, 2], [3, 1], [0, 1], [2, 3]])
    expected = np.einsum("tki,teoi->teo", x[:, 0], numpy_experts(parts)[chosen]) + parts["bias"][chosen]
    y = np.array(taken(parts, (4, 40, 96))(mx.array(x.astype(np.float32)), mx.array(chosen)))
    assert np.abs(y[:, :, 0] - expected).max() < 1e-5 * np.abs(expected).max()


def test_without_rotation_inputs_stay_as_they_are_unless_the_signs_show_that_weights_were_rotated() -> None:
    old = made_layer(3, (40, 64))
    new = old | {"signs": np.ones(64, np.float16)}
    x = np.random.default_rng(1).normal(size=(5, 64))
    for parts, rotated in ((old, True), (new, False)):
        y = np.array(taken(parts, (40, 64), rotation="none")(mx.array(x.astype(np.float32))))
        expected = x @ numpy_weight(parts, rotated).T + parts["bias"]
        assert np.abs(y - expected).max() < 1e-5 * np.abs(expected).max()


def test_only_its_own_block_is_taken_for_its_own() -> None:
    assert block_of({"quantization": BLOCK}) == BLOCK
    for other in (
        {},
        {"quantization": {"quant_method": "turboquant"}},
        {"quantization": {"mode": "affine", "bits": 4}},
    ):
        assert block_of(other) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rotation": "dense_qr"}, "rotation is 'dense_qr'; only hadamard, blockwise_hadamard, none can be read"),
        ({"fuse_rotations": True}, "fuse_rotations overwrote weights of its norms"),
    ],
)
def test_rotations_that_cannot_be_undone_are_refused_by_name(copy: Path, settings: Any, message: str) -> None:
    edit(copy, **settings)
    with pytest.raises(UnsupportedModelError, match=message):
        load_source(resolve(copy))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"codebook": np.zeros(32, np.float16)}, UnsupportedModelError, "a codebook of 32 values; only 2, 3, 4, 8, 16"),
        (
            {"scales": np.zeros((40, 4), np.float16)},
            UnsupportedModelError,
            "4 scales for 64 inputs; only groups of 32, 64",
        ),
        ({"scales": np.zeros((40, 0), np.float16)}, UnsupportedModelError, "0 scales for 64 inputs"),
        ({"weight": np.zeros((40, 6), np.uint32)}, CorruptCheckpointError, r"\[40, 6\] and .* has .*uint32 \[40, 7\]"),
        ({"signs": None}, CorruptCheckpointError, "layer layer of this turboquant-mlx model lacks signs"),
        ({"qjl_norms": np.zeros(40, np.float16)}, CorruptCheckpointError, "lacks qjl_packed, qjl_signs"),
    ],
)
def test_layers_that_are_not_as_described_are_refused_by_name(
    change: dict[str, NDArray[Any] | None], error: type[TurboQuantError], message: str
) -> None:
    parts = {name: part for name, part in (made_layer(3, (40, 64)) | change).items() if part is not None}
    with pytest.raises(error, match=message):
        taken(parts, (40, 64))


def test_qjl_for_experts_and_layers_that_the_model_lacks_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="QJL for experts"):
        taken(made_layer(3, (2, 40, 64), qjl=True), (2, 40, 64))
    tensors = {f"other.{name}": mx.array(part) for name, part in made_layer(3, (40, 64)).items()}
    with pytest.raises(UnsupportedModelError, match="layer other is none of mlx-lm's model"):
        take_layers(BLOCK, {"layer": (40, 64)}, tensors)


def test_a_head_that_guesses_ahead_is_left_out(copy: Path) -> None:
    index = copy / "model.safetensors.index.json"
    index.unlink()
    mx.save_safetensors(str(copy / "model-mtp.safetensors"), {"tq_speculator.fc.weight": mx.zeros((4, 4))})
    assert np.array_equal(logits(copy), logits(MADE))


def test_it_is_not_converted_or_exported_again(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="converted by TurboQuant already"):
        convert(MADE, tmp_path / "out")
    with pytest.raises(UnsupportedModelError, match="made by turboquant-mlx; it can be run here and not exported"):
        export(MADE, tmp_path / "out")


def test_it_generates_and_is_measured_as_it_is(tmp_path: Path, demo_model: Path) -> None:
    folder = Path(shutil.copytree(demo_model, tmp_path / "model"))
    tensors = mx.load(str(folder / "model.safetensors"))
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        made = made_layer(3, tensors.pop(name).shape)
        del made["bias"]
        tensors |= {f"{name.removesuffix('.weight')}.{part}": mx.array(array) for part, array in made.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    edit(folder, **BLOCK)
    model, tokenizer = load(folder)
    assert generate(model, tokenizer, "Once", max_tokens=3, chat=False).token_ids
    (row,) = evaluate(folder, text=load_text(None), seq_len=16, num_samples=1).rows
    assert (row.method, row.bits, row.group_size) == ("turboquant", 3, 32)
    assert 3.2 + 0.5 < row.bits_per_weight < 4.1  # ten codes to a word, 16 bits for 32, signs and codebooks
