"""The model card of a converted model."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from quant_engine.blueprint import Blueprint
from quant_engine.config import QuantConfig
from quant_engine.manifest import ModuleEntry

_LICENCE_KEYS = ("license", "license_name", "license_link")


def licence(card: Path) -> dict[str, str]:
    """The licence that a model card's front matter states; empty where it has none, or there is no card."""
    if not card.is_file():
        return {}
    matter = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    lines = matter.group(1).splitlines() if matter else []
    pairs = (line.partition(":") for line in lines if not line.startswith((" ", "-", "#")))
    return {key: value.strip() for key, _, value in pairs if key in _LICENCE_KEYS and value.strip()}


def model_card(
    name: str, origin: Mapping[str, str | None], recipe: QuantConfig, drawn: Blueprint, terms: Mapping[str, str]
) -> str:
    """The text of README.md: what the model is made from, how, how large it is, how to run it, its licence."""
    matter = ["---", *(f"{key}: {value}" for key, value in terms.items())]
    source = str(origin["name"])
    if origin["revision"]:
        matter.append(f"base_model: {source}")
    matter += ["library_name: mlx", "tags:", "- mlx", "- turboquant", "---", ""]
    stated = terms.get("license_name") or terms.get("license")
    entries = list(drawn.modules.values())
    rows = {
        "source": source,
        "commit": origin["revision"],
        "content (SHA-256)": origin["content_sha256"],
        **(_coding(recipe, entries) if entries else {}),
        "bits a weight, scales included": f"{drawn.bits_per_weight:.3f}",
        "weights quantized": f"{drawn.quantized_parameters:,} of {drawn.parameters:,}",
        "size": f"{drawn.size_bytes / 1e6:,.1f} MB",
    }
    table = ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items() if value)]
    return "\n".join(
        [
            *matter,
            f"# {name}",
            "",
            _INTRODUCTION,
            "",
            *table,
            "",
            *_kept(drawn, recipe.fold_rotation),
            "",
            _USE.format(name=name),
            "",
            "## Licence",
            "",
            _licence_text(stated, source),
            "",
        ]
    )


def export_card(
    name: str, origin: Mapping[str, str | None], converted: str, form: str, terms: Mapping[str, str]
) -> str:
    """The text of README.md of an exported model: from which conversion of what, in which form, and its licence.

    origin: of the float model that `converted` was made from, as a manifest records it.
    """
    source = str(origin["name"])
    matter = ["---", *(f"{key}: {value}" for key, value in terms.items())]
    if origin["revision"]:
        matter.append(f"base_model: {source}")
    matter += ["library_name: mlx", "tags:", "- mlx", "---", ""]
    about = (
        f"Exported by tq-mcp from `{converted}`, a TurboQuant conversion (arXiv 2504.19874) of {source}: "
        f"{_FORMS[form]}. It keeps the rounding errors of that conversion."
    )
    use = f'Opens in mlx-lm: `mlx_lm.generate --model PATH/{name} --prompt "Once upon a time"`.'
    stated = terms.get("license_name") or terms.get("license")
    return "\n".join(
        [*matter, f"# {name}", "", about, "", use, "", "## Licence", "", _licence_text(stated, source), ""]
    )


_FORMS = {
    "float": "dequantized",
    "affine": "dequantized and quantized again by MLX's affine method",
    "mxfp4": "dequantized and quantized again as mxfp4",
}

_FOLDED = "; norms and the residual stream's rotation folded into the weights"

_SCALES = {"search": "of least squared error", "rms": "the root mean square"}

_INTRODUCTION = (
    "Weights compressed with TurboQuant (arXiv 2504.19874): a randomized Hadamard rotation, then the nearest of a few "
    "values optimal for a Gaussian. Rounding used no calibration data."
)

_USE = """## Use

With tq-mcp (`pip install tq-mcp`):

    tq-mcp generate --model PATH/{name} --prompt "Once upon a time"

or in Python:

    from quant_engine import load
    model, tokenizer = load("PATH/{name}")"""


def _coding(recipe: QuantConfig, entries: list[ModuleEntry]) -> dict[str, str]:
    bits = _either(entry.bits for entry in entries)
    return {
        "code": f"Lloyd-Max, {bits} bits" + (", and one bit of QJL residual" if recipe.use_qjl else ""),
        "scales": f"float16, {_groups(entries)}, {_SCALES[recipe.scale]}",
        "rotation": f"{recipe.rotation}, seed {recipe.seed}" + (_FOLDED if recipe.fold_rotation else ""),
    }


def _groups(entries: list[ModuleEntry]) -> str:
    sizes = {entry.group_size for entry in entries}
    shared = [f"one for {_either(sizes - {0})} weights"] if sizes - {0} else []
    return " or ".join([*shared, *(["one a row"] if 0 in sizes else [])])


def _either(numbers: Iterable[int]) -> str:
    """The different ones in words: "2, 3 or 4"."""
    *others, last = map(str, sorted(set(numbers)))
    return f"{', '.join(others)} or {last}" if others else last


def _kept(drawn: Blueprint, folded: bool) -> list[str]:
    """How many modules are in full precision, by reason."""
    reasons: dict[str, int] = {}
    for reason in drawn.excluded.values():
        reasons[reason] = reasons.get(reason, 0) + 1
    kept = "In full precision: " if folded else "Kept as they came: "
    return [kept + "; ".join(f"{reason} ({count})" for reason, count in reasons.items()) + "."]


def _licence_text(stated: str | None, source: str) -> str:
    if stated:
        return f"{stated}, that of {source}."
    return f"{source} states none in its card; its terms apply to this model too."
