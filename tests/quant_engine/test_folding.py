"""A model whose norms and rotation are folded computes what it did before, in float and quantized, and rotates less."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

import metal_kernels
from quant_engine import mlx_lm_adapter as adapter
from quant_engine import rotation
from quant_engine.config import QuantConfig
from quant_engine.convert import convert
from quant_engine.errors import RecipeError, TurboQuantError, UnsupportedModelError
from quant_engine.export import export
from quant_engine.folding import Folding
from quant_engine.loader import load_source
from quant_engine.manifest import Manifest
from quant_engine.quantizer import QuantizedWeight, dequantize_weight, quantize_weight
from quant_engine.residual import Residual
from quant_engine.source import resolve
from tests.quant_engine.checkpoints import CONFIG, write_model
from tests.quant_engine.published import TOKENS, array, outline, write_published

FOLDED = QuantConfig(group_size=32, fold_rotation=True)
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
WRITERS = ("o_proj", "down_proj")


def checkpoint(architecture: str, tied: bool, folder: Path) -> Path:
    """A published checkpoint, tied or not, with biases wherever mlx-lm's model takes some; float32."""
    write_published(architecture, folder)
    config = outline(architecture)["config"] | {"tie_word_embeddings": tied}
    if architecture in ("llama", "mistral"):
        config |= {"attention_bias": True, "mlp_bias": True}
    (folder / "config.json").write_text(json.dumps(config))
    held = mx.load(str(folder / "model.safetensors"))
    for name, parameter in parameters(adapter.build(config)).items():
        held.setdefault(name, array(name, "F32", parameter.shape))
    if tied:
        held.pop("lm_head.weight", None)
    mx.save_safetensors(str(folder / "model.safetensors"), {n: a.astype(mx.float32) for n, a in held.items()})
    return folder


def parameters(model: nn.Module) -> dict[str, mx.array]:
    return dict(nn.utils.tree_flatten(model.parameters()))


def logits(model: Any) -> mx.array:
    return model(mx.array([TOKENS]))[0].astype(mx.float32)


def off(found: mx.array, expected: mx.array) -> float:
    return float(mx.abs(found - expected).max() / mx.abs(expected).max())


def greedy(model: nn.Module) -> list[int]:
    steps: Iterator[Any] = generate_step(mx.array(TOKENS), model, max_tokens=12)
    return [int(token) for token, _ in steps]


def tensors(folder: Path) -> dict[str, mx.array]:
    return {name: array for file in sorted(folder.glob("*.safetensors")) for name, array in mx.load(str(file)).items()}


def manifest_of(folder: Path) -> Manifest:
    found = Manifest.from_config(resolve(folder).config)
    assert found is not None
    return found


EVERY = [(architecture, tied) for architecture in ARCHITECTURES for tied in (False, True)]
UNTIED_AND_TIED = pytest.mark.parametrize(
    "original", [("llama", False), ("qwen2", True)], indirect=True, scope="module"
)


@pytest.fixture(scope="module", params=EVERY)
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture, tied = request.param
    return checkpoint(architecture, tied, tmp_path_factory.mktemp(architecture) / "in")


@pytest.fixture(scope="module")
def quantized(original: Path) -> Path:
    return convert(original, original.parent / "quantized", config=FOLDED).path


@pytest.mark.usefixtures("folding_alone")
class TestSameFunction:
    @pytest.fixture
    def folding_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Lets a conversion fold and quantize nothing, which is refused otherwise."""
        monkeypatch.setattr(sys.modules["quant_engine.convert"], "check_effect", lambda *_: None)

    def test_in_float_the_folded_model_gives_the_logits_and_tokens_of_the_original(
        self, original: Path, tmp_path: Path
    ) -> None:
        recipe = QuantConfig(group_size=32, fold_rotation=True, skip=("*",))
        made = convert(original, tmp_path / "folded", config=recipe)
        assert made.modules == 0
        before, after = load_source(resolve(original)), load_source(resolve(made.path))
        assert off(logits(after), logits(before)) < 1e-5
        assert greedy(after) == greedy(before)

    @pytest.mark.parametrize("width", [160, 288])
    def test_with_a_hadamard_matrix_that_is_not_symmetric_and_with_one_of_blocks(
        self, tmp_path: Path, width: int
    ) -> None:
        write_model(tmp_path / "in", hidden_size=width, dtype=mx.float32)
        recipe = QuantConfig(group_size=32, fold_rotation=True, skip=("*",), seed=3)
        made = convert(tmp_path / "in", tmp_path / "out", config=recipe)
        assert off(logits(load_source(resolve(made.path))), logits(load_source(resolve(tmp_path / "in")))) < 1e-5

    @UNTIED_AND_TIED
    def test_some_layers_in_float_and_others_quantized(self, original: Path, tmp_path: Path) -> None:
        """Nearly all error is that of the layers which are quantized, in the folded model and in the other."""
        settings: dict[str, Any] = {"bits": 4, "group_size": 32, "skip": ("*.0.*", "*.q_proj", "*.down_proj")}
        expected = logits(load_source(resolve(original)))
        errors: list[float] = []
        for fold in (True, False):
            recipe = QuantConfig(**settings, fold_rotation=fold)
            made = convert(original, tmp_path / f"folded-{fold}", config=recipe)
            assert 0 < made.modules < 7
            errors.append(off(logits(load_source(resolve(made.path))), expected))
        assert errors[0] < 2 * errors[1]


class TestQuantized:
    @UNTIED_AND_TIED
    def test_readers_hold_the_codes_of_their_weight_times_the_norms(self, original: Path, quantized: Path) -> None:
        before, after, entries = tensors(original), tensors(quantized), manifest_of(quantized).modules
        for path, entry in entries.items():
            layer, name = path.rsplit(".", 2)[0], path.split(".")[-1]
            assert (entry.block == 1) == (name in READERS)
            if name in READERS:
                norm = before[f"{layer}.{'input' if name in READERS[:3] else 'post_attention'}_layernorm.weight"]
                expected = quantize_weight(before[f"{path}.weight"] * norm, QuantConfig(group_size=32))
                assert mx.array_equal(after[f"{path}.weight"], expected.packed)
                assert mx.array_equal(after[f"{path}.scales"], expected.scales)

    @UNTIED_AND_TIED
    def test_only_norms_embeddings_head_and_writers_biases_differ_in_what_is_kept(
        self, original: Path, quantized: Path
    ) -> None:
        before, after = tensors(original), tensors(quantized)
        tied = "lm_head.weight" not in before
        ends = set[str]() if tied else {"model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"}
        for name in before.keys() & after.keys():
            if name.removesuffix(".weight") not in manifest_of(quantized).modules:
                changed = "layernorm" in name or name in ends or name.endswith(("o_proj.bias", "down_proj.bias"))
                assert mx.array_equal(before[name], after[name]) != changed, name
                assert "layernorm" not in name or mx.all(after[name] == 1)
        assert manifest_of(quantized).stream_block == (64 if tied else 1)

    def test_the_converted_model_gives_the_logits_of_its_dequantized_weights(
        self, original: Path, quantized: Path
    ) -> None:
        expected = by_hand(original, quantized)
        assert off(logits(load_source(resolve(quantized))), expected) < 2e-4
        assert off(logits(load_source(resolve(quantized), fuse=False)), expected) < 2e-4

    @UNTIED_AND_TIED
    def test_so_does_one_with_quantized_embeddings_and_head_and_one_with_qjl(
        self, original: Path, tmp_path: Path
    ) -> None:
        for number, more in enumerate(({"embed_bits": 4, "head_bits": 3}, {"use_qjl": True})):
            recipe = QuantConfig(group_size=32, fold_rotation=True, seed=5, **more)
            made = convert(original, tmp_path / str(number), config=recipe).path
            assert off(logits(load_source(resolve(made))), by_hand(original, made)) < 3e-4
            ends = {path: entry.block for path, entry in manifest_of(made).modules.items() if "layers" not in path}
            untied = {"model.embed_tokens": 1, "lm_head": 1}
            assert ends == ({} if number else untied if "lm_head" in ends else {"model.embed_tokens": 64})

    def test_quantized_sources_are_folded_as_their_dequantized_weights(self, tmp_path: Path) -> None:
        write_model(tmp_path / "float", dtype=mx.float32, hidden_size=128)
        model, _ = load_model(tmp_path / "float")
        nn.quantize(model, group_size=32, bits=8, class_predicate=lambda path, _: "proj" in path)
        block = {"quantization": {"group_size": 32, "bits": 8}}
        write_model(tmp_path / "packed", weights=lambda _: parameters(model), **block)
        floats = {n: a for n, a in tensors(tmp_path / "packed").items() if not n.endswith((".scales", ".biases"))}
        for path in [name.removesuffix(".weight") for name, a in floats.items() if a.dtype == mx.uint32]:
            parts = [tensors(tmp_path / "packed")[f"{path}.{part}"] for part in ("weight", "scales", "biases")]
            floats[f"{path}.weight"] = mx.dequantize(*parts, group_size=32, bits=8)
        write_model(tmp_path / "whole", weights=lambda _: floats)
        made = [convert(tmp_path / n, tmp_path / f"{n}-out", config=FOLDED).path for n in ("packed", "whole")]
        assert (made[0] / "model.safetensors").read_bytes() == (made[1] / "model.safetensors").read_bytes()


def by_hand(original: Path, converted: Path) -> mx.array:
    """The logits of the dequantized weights by mlx-lm's layers, the ends of a tied model's stream by a matrix R."""
    manifest, held = manifest_of(converted), tensors(converted)
    for path, entry in manifest.modules.items():
        errors = None
        if entry.qjl:
            errors = Residual(
                held.pop(f"{path}.qjl_signs"), held.pop(f"{path}.qjl_norms"), entry.shape[1], manifest.seed
            )
        weight = QuantizedWeight(
            held[f"{path}.weight"], held.pop(f"{path}.scales"), manifest.codebook(entry.bits), entry.bits,
            entry.group_size, manifest.seed, entry.block, errors,
        )  # fmt: skip
        held[f"{path}.weight"] = dequantize_weight(weight)
    built: Any = adapter.build(resolve(original).config)
    adapter.set_parameters(built, held)
    identity = mx.eye(64)
    tied = "lm_head.weight" not in held
    turn = metal_kernels.rotate(identity, mx.array(rotation.signs(64, manifest.seed)), 64) if tied else identity
    h = built.model.embed_tokens(mx.array([TOKENS])) @ turn
    for layer in built.model.layers:
        h = layer(h, "causal", None)
    h = built.model.norm(h @ turn.T)
    return (h @ (held["model.embed_tokens.weight"] if tied else held["lm_head.weight"]).T)[0]


@UNTIED_AND_TIED
def test_a_layer_rotates_twice_and_no_longer_four_times(
    original: Path, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    for module in ("metal_kernels.matmul", "quant_engine.stream_ends"):
        for name in {"rotate", "unrotate"} & set(vars(sys.modules[module])):
            monkeypatch.setattr(sys.modules[module], name, counting(vars(sys.modules[module])[name], calls))
    plain = convert(original, tmp_path / "plain", config=QuantConfig(group_size=32)).path
    counts: dict[Path, int] = {}
    with metal_kernels.use_backend("reference"):
        for folder in (plain, quantized):
            model = load_source(resolve(folder))
            calls.clear()
            mx.eval(logits(model))
            counts[folder] = len(calls)
    tied = manifest_of(quantized).stream_block > 1
    assert counts == {plain: 4 * 2, quantized: 2 * 2 + (2 if tied else 0)}


def counting(function: Any, calls: list[int]) -> Any:
    def counted(x: mx.array, signs: mx.array | None, block: int) -> mx.array:
        if block > 1:
            calls.append(block)
        return function(x, signs, block)

    return counted


class TestExport:
    def test_plain_mlx_lm_computes_what_the_folded_model_does(self, quantized: Path, tmp_path: Path) -> None:
        made = export(quantized, tmp_path / "float", dtype="float32")
        plain, config = load_model(made.path)
        assert off(logits(plain), logits(load_source(resolve(quantized)))) < 1e-5
        assert "quantization" not in config
        affine, _ = load_model(export(quantized, tmp_path / "affine", form="affine", bits=8, group_size=32).path)
        assert off(logits(affine), logits(plain)) < 0.1

    @UNTIED_AND_TIED
    def test_layers_in_float_are_turned_back_too(self, original: Path, tmp_path: Path) -> None:
        recipe = QuantConfig(group_size=32, fold_rotation=True, skip=("*.0.*",), embed_bits=4)
        made = convert(original, tmp_path / "converted", config=recipe).path
        plain, _ = load_model(export(made, tmp_path / "float", dtype="float32").path)
        assert off(logits(plain), logits(load_source(resolve(made)))) < 1e-5


class TestRefusals:
    @pytest.mark.parametrize(
        ("architecture", "reason"),
        [
            (
                "gemma2",
                r"'gemma2': its layers have other norms \(post_feedforward_layernorm, pre_feedforward_layernorm",
            ),
            ("olmo2", "'olmo2': its layers have other norms"),
            ("qwen3_moe", r"'qwen3_moe': it has experts \(model\.layers\.0\.mlp\.switch_mlp\.\w+\)"),
            ("starcoder2", "'starcoder2': its norms take the mean away"),
            ("cohere2", "'cohere2': its norms take the mean away"),
            ("granite", "'granite': how its layers read the residual stream is not known here"),
        ],
    )
    def test_architectures_without_a_place_for_it(self, tmp_path: Path, architecture: str, reason: str) -> None:
        with pytest.raises(UnsupportedModelError, match=reason + r".*\. It fits llama, mistral, qwen2 and qwen3"):
            convert(write_published(architecture, tmp_path / "in"), tmp_path / "out", config=FOLDED)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("width", "rotation", "message"),
        [(33, "auto", "a hidden size of 33 has no Hadamard block"), (288, "hadamard", "no Hadamard matrix of 288")],
    )
    def test_widths_without_a_block(self, width: int, rotation: str, message: str) -> None:
        config = CONFIG | {"hidden_size": width, "num_attention_heads": 3, "num_key_value_heads": 3}
        with pytest.raises(RecipeError, match=message):
            Folding.of(config, QuantConfig(fold_rotation=True, rotation=rotation))

    def test_no_rotation(self) -> None:
        with pytest.raises(TurboQuantError, match="fold_rotation has nothing to fold with rotation 'none'"):
            QuantConfig(fold_rotation=True, rotation="none")
