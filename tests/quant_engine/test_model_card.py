from pathlib import Path

import pytest

from quant_engine.blueprint import draw
from quant_engine.config import QuantConfig
from quant_engine.model_card import export_card, licence, model_card
from quant_engine.parameters import Parameters
from quant_engine.source import resolve
from tests.quant_engine.checkpoints import write_model


def _card(folder: Path, recipe: QuantConfig, revision: str | None = None, terms: dict[str, str] | None = None) -> str:
    source = resolve(write_model(folder))
    drawn = draw(source.config, Parameters(source.config, source.tensors), recipe)
    origin = source.origin() | {"name": "owner/name", "revision": revision}
    return model_card("small-3bit", origin, recipe, drawn, terms or {})


def test_a_card_says_what_it_was_made_from_how_and_how_to_use_it(tmp_path: Path) -> None:
    text = _card(tmp_path, QuantConfig(seed=4), "abc123", {"license": "mit"})
    assert text.startswith("---\nlicense: mit\nbase_model: owner/name\nlibrary_name: mlx\n")
    for part in ("# small-3bit", "| commit | abc123 |", "Lloyd-Max, 3 bits", "seed 4", "| 3.250 |",
                 "mit, that of owner/name", "tq-mcp generate --model PATH/small-3bit",
                 "norm (5)", "embeddings (1)"):  # fmt: skip
        assert part in text


def test_a_card_names_qjl_and_scales_a_row(tmp_path: Path) -> None:
    text = _card(tmp_path, QuantConfig(use_qjl=True, group_size=0, scale="rms"))
    assert "and one bit of QJL residual" in text
    assert "one a row, the root mean square" in text
    assert "states none in its card" in text
    assert "base_model" not in text and "commit" not in text


def test_a_card_names_all_widths_and_groups_that_layers_have(tmp_path: Path) -> None:
    own = QuantConfig(attn_bits=4, bits_for=(("*.up_proj", 2),), groups_for=(("*.up_proj", 128), ("*.down_proj", 0)))
    text = _card(tmp_path, own)
    assert "Lloyd-Max, 2, 3 or 4 bits |" in text
    assert "float16, one for 64 or 128 weights or one a row, of least" in text


def test_a_card_of_a_model_that_is_left_whole_states_no_code(tmp_path: Path) -> None:
    text = _card(tmp_path, QuantConfig(skip=("*",)))
    assert "Lloyd-Max, " not in text and "skipped on request (16)" in text


def test_a_card_says_that_the_rotation_is_folded(tmp_path: Path) -> None:
    text = _card(tmp_path, QuantConfig(fold_rotation=True))
    assert "seed 0; norms and the residual stream's rotation folded into the weights" in text
    assert "In full precision: " in text and "as they came" not in text


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: apache-2.0\ntags:\n- license: no\n---\n# x\n", {"license": "apache-2.0"}),
        ("---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\n---\n",
         {"license": "other", "license_name": "llama3", "license_link": "LICENSE"}),
        ("# no front matter\nlicense: mit\n", {}),
        ("---\nlicense:\n---\n", {}),
        ("", {}),
    ],
)  # fmt: skip
def test_the_licence_is_that_of_the_sources_front_matter(tmp_path: Path, card: str, expected: dict[str, str]) -> None:
    (tmp_path / "README.md").write_text(card)
    assert licence(tmp_path / "README.md") == expected


def test_a_source_without_card_states_no_licence(tmp_path: Path) -> None:
    assert licence(tmp_path / "README.md") == {}


def test_the_card_of_an_export_says_what_it_is_and_keeps_the_licence() -> None:
    origin = {"name": "owner/name", "revision": "abc123", "content_sha256": None}
    text = export_card("small-float", origin, "small-3bit", "float", {"license": "mit"})
    assert text.startswith("---\nlicense: mit\nbase_model: owner/name\nlibrary_name: mlx\n")
    for part in ("# small-float", "`small-3bit`", "of owner/name: dequantized", "mit, that of owner/name"):
        assert part in text
    assert "turboquant" not in text.split("---")[1]
