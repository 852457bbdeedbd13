"""Bits go to the layers that need them, within the budget."""

from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quant_engine import allocation
from quant_engine.allocation import Budget, Choice, allocate, forms_of, relative_error, spend
from quant_engine.config import QuantConfig
from quant_engine.convert import convert
from quant_engine.errors import InputError, RecipeError
from quant_engine.evaluate import evaluate
from quant_engine.manifest import Manifest, ModuleEntry
from quant_engine.source import resolve
from quant_engine.text import Text
from tests.quant_engine.checkpoints import write_model
from tests.quant_engine.published import write_published

ERRORS = {2: 0.11, 3: 0.03, 4: 0.007}
WIDTH = 128


def layer(rows: int, kl: float, groups: tuple[int, ...] = (32, 64, 128)) -> list[Choice]:
    """A layer (rows, WIDTH) that costs kl at 3 bits in groups of 64, and more in larger ones."""
    forms = [ModuleEntry(bits, group, 1, (rows, WIDTH)) for bits in ERRORS for group in groups]
    return [Choice(form, kl * ERRORS[form.bits] / 0.03 * (form.group_size / 64) ** 0.1) for form in forms]


LAYERS = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=3),
    st.builds(layer, st.integers(1, 10**4), st.floats(1e-6, 1.0)),
    min_size=1, max_size=12,
)  # fmt: skip


def total(choices: dict[str, Choice]) -> int:
    return sum(choice.nbytes for choice in choices.values())


@given(LAYERS, st.floats(0, 1))
def test_the_budget_is_kept_and_no_better_choice_that_fits_is_left(layers: dict[str, list[Choice]], at: float) -> None:
    least, most = (sum(end(c.nbytes for c in each) for each in layers.values()) for end in (min, max))
    budget = int(least + at * (most - least))
    chosen = spend(layers, budget)
    left = budget - total(chosen)
    assert left >= 0
    for path, each in layers.items():
        now = chosen[path]
        assert not [c for c in each if c.kl < now.kl and c.nbytes - now.nbytes <= left]


def test_what_costs_more_gets_more() -> None:
    costs = {"calm": 0.001, "delicate": 1.0, "usual": 0.03}
    chosen = spend({name: layer(100, kl, groups=(64,)) for name, kl in costs.items()}, 300 * WIDTH * 13 // 32)
    assert {name: c.form.bits for name, c in chosen.items()} == {"calm": 2, "delicate": 4, "usual": 3}


def test_the_choice_is_as_good_as_any_of_all() -> None:
    random = np.random.default_rng(0)
    layers = {name: layer(1000, float(random.lognormal(-4, 1.5))) for name in "abcd"}
    budget = 4 * 1000 * WIDTH * 13 // 32
    fitting = (each for each in product(*layers.values()) if sum(c.nbytes for c in each) <= budget)
    best = min(sum(c.kl for c in each) for each in fitting)
    assert sum(c.kl for c in spend(layers, budget).values()) <= 1.05 * best


def test_the_error_is_that_of_the_weight_as_it_is() -> None:
    config, even = QuantConfig(rotation="none"), mx.random.normal((64, WIDTH), key=mx.random.key(0))
    form = {bits: ModuleEntry(bits, 32, 1, (64, WIDTH)) for bits in ERRORS}
    found = {bits: relative_error(even, config, form[bits]) for bits in ERRORS}
    assert all(0.6 * ERRORS[bits] < found[bits] < 1.1 * ERRORS[bits] for bits in ERRORS)
    uneven = even * mx.where(mx.arange(WIDTH) % 32 == 0, 30.0, 1.0)
    assert relative_error(uneven, config, form[3]) != pytest.approx(found[3], rel=0.2)
    assert relative_error(mx.zeros((64, WIDTH)), config, form[3]) == 0
    assert relative_error(mx.stack([even, even]), config, form[3]) == pytest.approx(found[3], rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "path", "groups"),
    [
        ({}, "x", [32, 64, 128]),
        ({"group_size": 0}, "x", [0, 32, 64, 128]),
        ({"groups_for": [("x", 64)]}, "x", [64]),
        ({"groups_for": [("y", 32)]}, "x", [32, 64, 128]),
    ],
)
def test_groups_are_all_that_fit_or_the_layers_own(settings: dict[str, Any], path: str, groups: list[int]) -> None:
    config = QuantConfig(**settings)
    entry = ModuleEntry(3, config.group_size, 1, (8, WIDTH))
    forms = forms_of(path, entry, config)
    assert [(form.bits, form.group_size) for form in forms] == list(product((2, 3, 4), groups))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little text, since these tests are about what is counted."""
    monkeypatch.setattr(allocation, "WINDOWS", 1)
    monkeypatch.setattr(allocation, "WINDOW_TOKENS", 16)


@pytest.mark.parametrize(
    ("settings", "target"),
    [
        ({}, 2.7), ({"use_qjl": True}, 4.2), ({"group_size": 0}, 2.6), ({"embed_bits": 2, "head_bits": 4}, 3.2),
        ({"attn_bits": 4}, 3.3), ({"fold_rotation": True}, 3.1), ({"protect_layers": 1, "mlp_bits": 16}, 3.3),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("short")
def test_the_conversion_keeps_the_target_and_comes_near_it(
    tmp_path: Path, settings: dict[str, Any], target: float
) -> None:
    model = write_model(tmp_path / "made", num_hidden_layers=3)
    recipe = allocate(resolve(model), QuantConfig(**settings), target)
    made = convert(model, tmp_path / "out", config=recipe)
    assert target - 0.1 < made.bits_per_weight <= target


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_experts_share_the_budget(tmp_path: Path, name: str) -> None:
    """Those of gpt_oss come quantized, as MXFP4."""
    model = write_published(name, tmp_path / "made")
    recipe = allocate(resolve(model), QuantConfig(group_size=32), 3.3, keep_unfitting=True)
    assert 3.1 < convert(model, tmp_path / "out", config=recipe, keep_unfitting=True).bits_per_weight <= 3.3


@pytest.mark.usefixtures("short")
def test_layers_with_a_width_or_groups_of_their_own_keep_them(tmp_path: Path) -> None:
    model = write_model(tmp_path / "made")
    own = QuantConfig(attn_bits=3, bits_for=(("*.0.mlp.up_proj", 2),), groups_for=(("*.1.mlp.up_proj", 128),))
    made = convert(model, tmp_path / "out", config=allocate(resolve(model), own, 3.6))
    manifest = Manifest.from_config(resolve(made.path).config)
    assert manifest is not None
    for path, entry in manifest.modules.items():
        if "self_attn" in path:
            assert (entry.bits, entry.group_size) == (3, 64)
    assert (manifest.modules["model.layers.0.mlp.up_proj"].bits, own.group_size) == (2, 64)
    assert manifest.modules["model.layers.1.mlp.up_proj"].group_size == 128


@pytest.mark.usefixtures("short")
def test_layers_that_do_not_fit_are_kept_if_asked(tmp_path: Path) -> None:
    source = resolve(write_model(tmp_path, intermediate_size=172))
    with pytest.raises(RecipeError, match="width of 172"):
        allocate(source, QuantConfig(), 3)
    recipe = allocate(source, QuantConfig(), 3, keep_unfitting=True)
    assert not [path for path, _ in recipe.bits_for if path.endswith("down_proj")]


@pytest.mark.parametrize(
    ("target", "settings", "ends"),
    [
        (2.0, {}, "2.125 to 4.5"),
        (4.75, {}, "2.125 to 4.5"),
        (3.0, {"use_qjl": True}, r"3.\d+ to 5.\d+"),
        (2.5, {"group_size": 64, "attn_bits": 4}, r"2.\d+ to 4.\d+"),
    ],
)
def test_a_target_out_of_reach_is_refused(tmp_path: Path, target: float, settings: dict[str, Any], ends: str) -> None:
    with pytest.raises(RecipeError, match=rf"target_bpw is {target}; .* take {ends} bits a weight"):
        allocate(resolve(write_model(tmp_path)), QuantConfig(**settings), target)


def test_there_must_be_a_layer_to_choose_for(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="target_bpw finds no layer to choose a width for"):
        Budget.of(resolve(write_model(tmp_path)), QuantConfig(attn_bits=3, mlp_bits=3))


def test_it_beats_one_width_for_all_at_the_same_size(demo_model: Path, tmp_path: Path) -> None:
    mixed = allocate(resolve(demo_model), QuantConfig(), 3.25)
    text = Text.of("prose", (demo_model / "README.md").read_text() * 3)
    made = convert(demo_model, tmp_path / "mixed", config=mixed)
    assert made.bits_per_weight <= 3.25
    even = evaluate(demo_model, bits=(3,), text=text, seq_len=256, num_samples=8, affine=False, qjl=False).rows
    uneven = evaluate(tmp_path / "mixed", text=text, seq_len=256, num_samples=8, reference=demo_model, affine=False)
    assert uneven.rows[1].kl is not None and even[1].kl is not None
    assert uneven.rows[1].kl < 0.95 * even[1].kl


def test_a_text_takes_the_place_of_the_models_own(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation, "WINDOWS", 2)
    source, seen = resolve(demo_model), list[Any]()
    monkeypatch.setattr(allocation, "write_text", lambda model: pytest.fail("wrote a text"))
    monkeypatch.setattr(allocation, "measure", lambda model, forms, tokens, *rest: seen.append(tokens) or {})
    allocate(source, QuantConfig(), 3, text=Text.of("prose", (demo_model / "README.md").read_text()))
    assert seen[0].shape == (2, allocation.WINDOW_TOKENS)
    with pytest.raises(InputError, match=r"text 'short' has \d+ tokens"):
        allocate(source, QuantConfig(), 3, text=Text.of("short", "no"))


def test_writing_is_the_same_for_a_seed_and_differs_between_windows(demo_model: Path) -> None:
    model = allocation.load_source(resolve(demo_model), fuse=False)
    first = allocation.write_text(model)
    assert np.array_equal(first, allocation.write_text(model))
    assert first.shape == (allocation.WINDOWS, allocation.WINDOW_TOKENS)
    assert len({tuple(window) for window in first}) == len(first)


def test_a_text_that_is_too_short_is_refused_without_advice_about_its_windows(demo_model: Path) -> None:
    with pytest.raises(InputError, match=r"one window needs 128; give a longer text$"):
        allocate(resolve(demo_model), QuantConfig(), 3, text=Text.of("short", "A few words."))


def test_a_pattern_that_matches_nothing_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="bits_for has the pattern 'zzz'"):
        Budget.of(resolve(write_model(tmp_path)), QuantConfig(bits_for=(("zzz", 3),)))
