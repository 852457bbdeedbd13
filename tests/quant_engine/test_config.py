import pytest

from quant_engine.config import CacheConfig, QuantConfig
from quant_engine.errors import RecipeError


def test_the_default_recipe_is_three_bits_in_groups_of_64() -> None:
    assert QuantConfig() == QuantConfig(bits=3, group_size=64, rotation="auto", scale="search", use_qjl=False, seed=0)


def test_the_default_cache_keeps_more_bits_for_keys_than_for_values() -> None:
    assert (CacheConfig().k_bits, CacheConfig().v_bits) == (8, 4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bits", 5),
        ("bits", True),
        ("bits", "3"),
        ("bits", 3.0),
        ("group_size", 48),
        ("group_size", -64),
        ("rotation", "hadmard"),
        ("scale", "max"),
        ("use_qjl", 1),
        ("fold_rotation", 1),
        ("seed", -1),
        ("seed", 2**63),
        ("code", "trellis"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name_and_value(name: str, value: object) -> None:
    with pytest.raises(RecipeError, match=rf"^{name} is {value!r}; "):
        QuantConfig.from_dict({name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("k_bits", 5), ("v_bits", 1), ("group_size", 16), ("sink_tokens", -1), ("recent_tokens", 1.5)],
)
def test_a_cache_setting_out_of_range_is_refused(name: str, value: object) -> None:
    with pytest.raises(RecipeError, match=f"^{name} is "):
        CacheConfig.from_dict({name: value})


def test_unknown_settings_are_refused_with_the_known_ones_listed() -> None:
    with pytest.raises(RecipeError, match=r"unknown setting group, widths; the settings are bits, group_size"):
        QuantConfig.from_dict({"bits": 3, "widths": 2, "group": 1})


def test_recipes_survive_json_values() -> None:
    weights = QuantConfig(bits=2, group_size=128, rotation="none", use_qjl=True, seed=7)
    cache = CacheConfig(k_bits=4, sink_tokens=4)
    assert QuantConfig.from_dict(weights.to_dict()) == weights
    assert CacheConfig.from_dict(cache.to_dict()) == cache
