"""A config.json with the names that mlx-lm reads beside those that transformers 5 writes."""

from collections.abc import Mapping, Sequence
from typing import Any, cast


def readable(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with older names added; what is there under an older name is left as it is."""
    known = dict(config)
    rope: Any = known.get("rope_parameters")
    added = _before_rope_parameters(cast(dict[str, Any], rope)) if isinstance(rope, dict) else {}
    if "num_local_experts" in known:
        added["num_experts"] = known["num_local_experts"]
    if "block_multiple_of" in known:  # of Lfm2, whose block_dim transformers leaves out where it is the hidden size
        added["block_dim"] = known.get("hidden_size")
    period = _sliding_window_pattern(known)
    if period:
        added["sliding_window_pattern"] = period
    if isinstance(known.get("text_config"), dict):
        text = known["text_config"] = readable(cast(dict[str, Any], known["text_config"]))
        if "vocab_size" in text:
            added["vocab_size"] = text["vocab_size"]
    return added | known


def _before_rope_parameters(rope: Mapping[str, Any]) -> dict[str, Any]:
    """What `rope_parameters` hold, of all layers or of each kind of layer, as it was written before there were such."""
    whole = cast(Mapping[str, Any], rope.get("full_attention", rope))
    sliding = cast(Mapping[str, Any], rope.get("sliding_attention", {}))
    added = {name: whole[name] for name in ("rope_theta", "partial_rotary_factor") if name in whole}
    if "rope_theta" in sliding:
        added["rope_local_base_freq"] = sliding["rope_theta"]
    added["rope_scaling"] = whole if whole.get("rope_type", "default") != "default" else None
    return added


def _sliding_window_pattern(config: Mapping[str, Any]) -> int | None:
    """How many layers it takes from one of full attention to the next, where they alternate so; None otherwise."""
    if "_sliding_window_pattern" in config:
        return cast(int, config["_sliding_window_pattern"])
    kinds = cast(Sequence[str], config.get("layer_types") or ())
    if set(kinds) != {"sliding_attention", "full_attention"}:
        return None
    period = kinds.index("full_attention") + 1
    regular = [("sliding_attention", "full_attention")[(i + 1) % period == 0] for i in range(len(kinds))]
    return period if list(kinds) == regular else None
