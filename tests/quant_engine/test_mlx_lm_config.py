from typing import Any

import pytest

from quant_engine.mlx_lm_config import readable

SLIDING, FULL = "sliding_attention", "full_attention"
LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}


def test_rope_parameters_get_their_older_names() -> None:
    default = {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.25}
    known = readable({"rope_parameters": default})
    assert (known["rope_theta"], known["partial_rotary_factor"], known["rope_scaling"]) == (5e5, 0.25, None)
    assert readable({"rope_parameters": LINEAR})["rope_scaling"] == LINEAR


def test_rope_parameters_of_each_kind_of_layer_get_their_older_names() -> None:
    known = readable({"rope_parameters": {FULL: LINEAR, SLIDING: {"rope_type": "default", "rope_theta": 1e4}}})
    assert (known["rope_theta"], known["rope_local_base_freq"], known["rope_scaling"]) == (1e6, 1e4, LINEAR)


def test_what_an_older_name_says_stays() -> None:
    config = {"rope_parameters": LINEAR, "rope_theta": 7.0, "rope_scaling": {"type": "yarn"}, "num_experts": 3}
    assert readable(config | {"num_local_experts": 5}) == config | {"num_local_experts": 5}


@pytest.mark.parametrize(
    ("config", "period"),
    [
        ({"layer_types": [SLIDING, SLIDING, FULL] * 2}, 3),
        ({"layer_types": [SLIDING, SLIDING, FULL, SLIDING]}, 3),
        ({"layer_types": [SLIDING, FULL, FULL, SLIDING]}, None),
        ({"layer_types": [SLIDING] * 4}, None),
        ({"layer_types": [SLIDING] * 2, "_sliding_window_pattern": 6}, 6),
        ({}, None),
    ],
)
def test_layers_that_alternate_regularly_have_a_period(config: dict[str, Any], period: int | None) -> None:
    assert readable(config).get("sliding_window_pattern") == period


def test_the_language_model_of_a_larger_one_is_read_too() -> None:
    known = readable({"text_config": {"vocab_size": 96, "num_local_experts": 4}})
    assert (known["vocab_size"], known["text_config"]["num_experts"]) == (96, 4)
