"""Names that models and caches get where the user gives none."""

import pytest

from quant_engine.config import CacheConfig, QuantConfig
from tq_mcp import records
from tq_mcp.locate import Located
from tq_mcp.services import cache_configs, cache_name


class TestNames:
    @pytest.mark.parametrize(
        ("source", "name"),
        [
            ("Qwen/Qwen2.5-0.5B", "Qwen2.5-0.5B-tq3-g64"),
            ("a model (new)", "a-model--new-tq3-g64"),
            ("模型", "model-tq3-g64"),
            ("x" * 200, "x" * 70 + "-tq3-g64"),
        ],
    )
    def test_a_default_name_is_always_a_valid_one(self, source: str, name: str) -> None:
        assert records.default_name(Located(source, source, None), QuantConfig()) == name

    def test_qjl_is_in_the_name(self) -> None:
        assert records.default_name(Located("m", "m", None), QuantConfig(2, 32, use_qjl=True)) == "m-tq2-g32-qjl"

    def test_widths_of_modules_make_another_name(self) -> None:
        names = {
            records.default_name(Located("m", "m", None), recipe)
            for recipe in (QuantConfig(), QuantConfig(attn_bits=4), QuantConfig(skip=("*.0.*",)))
        }
        assert len(names) == 3 and "m-tq3-g64" in names


class TestCacheOptions:
    def test_without_bits_the_usual_ones_are_compared(self) -> None:
        assert [(c.k_bits, c.v_bits) for c in cache_configs()] == [(8, 8), (8, 4), (4, 4), (3, 3)]

    def test_equal_bits_and_a_pair_add_up(self) -> None:
        chosen = cache_configs([3, 4], k_bits=8, v_bits=2, group_size=32)
        assert [(c.k_bits, c.v_bits, c.group_size) for c in chosen] == [(3, 3, 32), (4, 4, 32), (8, 2, 32)]

    def test_half_a_pair_is_completed_by_the_default(self) -> None:
        assert [(c.k_bits, c.v_bits) for c in cache_configs(v_bits=2)] == [(8, 2)]

    def test_a_cache_in_words(self) -> None:
        assert cache_name(None) == "full precision"
        assert cache_name(CacheConfig(3, 3)) == "3-bit keys, 3-bit values"
