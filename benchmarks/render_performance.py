"""Write the tables of docs/performance.md from benchmarks/results/*.json, between its markers."""

import json
import re
from typing import Any

from benchmarks.render_readme import RESULTS, ROOT, table

PAGE = ROOT / "docs" / "performance.md"
MARKERS = re.compile(r"(<!-- tables:begin -->\n).*?(<!-- tables:end -->)", re.S)
TITLES = {
    "matvec": "Few vectors times a matrix",
    "matmul": "Many rows times a matrix",
    "experts": "Products with experts",
    "attention": "Attention",
    "speed": "Whole models",
    "convert": "Converting",
    "big_model": "A Llama of 8.0 billion parameters",
    "prefill": "Memory of a long prompt",
}
DEVICES = {"": "CPU", "-cuda": "NVIDIA", "-metal": "Apple"}


def tables() -> str:
    """Every result there is, one table each."""
    parts: list[str] = []
    for name, title in TITLES.items():
        for suffix, device in DEVICES.items():
            path = RESULTS / f"{name}{suffix}.json"
            if path.exists():
                parts.append(f"### {title}, {device}\n\n{_section(json.loads(path.read_text()))}")
    return "\n\n".join(parts)


def _section(result: dict[str, Any]) -> str:
    columns = list(dict.fromkeys(column for row in result["rows"] for column in row))
    rows = [[_cell(row.get(column)) for column in columns] for row in result["rows"]]
    header = [column.replace("_", " ") for column in columns]
    return f"{result['machine']}; `{result['command']}`.\n\n{table(header, rows)}"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "" if value is None else str(value)


def render(page: str) -> str:
    """The page with its tables replaced."""
    return MARKERS.sub(lambda match: f"{match[1]}\n{tables()}\n\n{match[2]}", page)


def main() -> None:
    PAGE.write_text(render(PAGE.read_text()))
    print(f"{PAGE.relative_to(ROOT)} is written")


if __name__ == "__main__":
    main()
