"""Write README's results from benchmarks/results/quality.json and speed.json, between README's markers.

Both files hold `machine` and `command`. quality.json adds `report`, which is what `tq-mcp evaluate --json`
prints, its rows with `cost`, `paired_stderr` and, where they are unusual, `scale` and `target_bpw`. speed.json
adds `rows` of `model`, `method`, `bits`, `prompt_tokens_per_s`, `prompt_times_affine`, `generation_tokens_per_s`,
`generation_times_affine` and `kernel_path`. A file that is absent leaves its table out.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MARKERS = re.compile(r"(<!-- results:begin -->\n).*?(<!-- results:end -->)", re.S)
METHODS = {
    "float": "as it came",
    "affine": "MLX affine",
    "turboquant": "**TurboQuant**",
    "turboquant+qjl": "TurboQuant + QJL",
}


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def quality(result: dict[str, Any]) -> str:
    """Perplexity and divergence of each method, against the model as it came."""
    report = result["report"]
    float_ppl = next(row["ppl"] for row in report["rows"] if row["method"] == "float")
    rows = [
        [
            weights(row),
            number(row["bits_per_weight"], ".2f"),
            number(row["size_bytes"] / 1e6, ".1f"),
            f"{row['ppl']:.2f} ± {row['ppl_stderr']:.2f}",
            f"{row['cost']:+.1%} ± {row['paired_stderr'] / float_ppl:.1%}" if row["method"] != "float" else "",
            number(row["kl"], ".4f"),
            number(row["top1"], ".1%"),
        ]
        for row in report["rows"]
    ]
    header = ["weights", "bits a weight", "MB", "perplexity", "cost", "KL divergence", "same first choice"]
    caption = (
        f"Quality of `{Path(report['model']).name}` on `{report['text']['name']}`: "
        f"{report['num_samples']} windows of {report['seq_len']} tokens. {origin(result)}"
    )
    return f"{caption}\n\n{table(header, rows)}"


def weights(row: dict[str, Any]) -> str:
    """How a row's weights are held, in words."""
    name = METHODS[row["method"]]
    if row["method"] == "float":
        return name
    if "target_bpw" in row:
        return f"{name}, {row['target_bpw']} bits shared out"
    return f"{'codes with RMS scales' if row.get('scale') == 'rms' else name}, {row['bits']} bits"


def speed(result: dict[str, Any]) -> str:
    """Tokens a second and how many times those of mlx-lm's affine model, as measured side by side in one run."""
    rows = [
        [
            f"{row['model']}, {METHODS.get(row['method'], row['method'])}, {row['bits']} bits",
            number(row["prompt_tokens_per_s"], ",.0f"),
            number(row["prompt_times_affine"], ".1f"),
            number(row["generation_tokens_per_s"], ",.0f"),
            number(row["generation_times_affine"], ".1f"),
            f"`{row['kernel_path']}`",
        ]
        for row in result["rows"]
    ]
    header = ["model", "prompt tokens/s", "× affine", "generated tokens/s", "× affine", "path"]
    return f"Speed. {origin(result)}\n\n{table(header, rows)}"


def origin(result: dict[str, Any]) -> str:
    return f"{result['machine']}; `{result['command']}`."


def render(readme: str, results: Path) -> str:
    """README with its results block written anew; raises ValueError where it has no markers."""
    parts = [
        make(json.loads((results / name).read_text()))
        for name, make in (("quality.json", quality), ("speed.json", speed))
        if (results / name).is_file()
    ]
    body = "\n\n".join(parts) or "Nothing was measured yet: run `make bench`."
    if not MARKERS.search(readme):
        raise ValueError("README has no results:begin and results:end markers: put them where the tables belong")
    return MARKERS.sub(lambda found: f"{found[1]}{body}\n{found[2]}", readme)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.readme.write_text(render(args.readme.read_text(), args.results))


if __name__ == "__main__":
    main()
