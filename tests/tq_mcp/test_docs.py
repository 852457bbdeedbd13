"""The documents tell of every tool, command, option and setting, and their command lines are taken."""

import re
import shlex
from pathlib import Path

import pytest

from tq_mcp import settings, tools
from tq_mcp.cli.parser import build_parser

DOCUMENTS = ("README.md", "docs/using.md")


@pytest.fixture(scope="module")
def text(repository: Path) -> str:
    return "\n".join((repository / name).read_text() for name in DOCUMENTS)


def command_lines(text: str) -> list[str]:
    """Every `tq-mcp ...` in code: indented lines and code spans."""
    indented = re.findall(r"^    tq-mcp (.+)$", text, re.MULTILINE)
    spans = re.findall(r"`(?:\.venv/bin/)?tq-mcp ([a-z][^`]*)`", text)
    return [*indented, *spans]


def test_every_tool_is_told_of(text: str) -> None:
    assert [tool.name for tool in tools.ALL if f"`{tool.name}`" not in text] == []


def test_every_setting_is_told_of(text: str, repository: Path) -> None:
    names = re.findall(r'"(TQ_[A-Z_]+)"', (repository / "tq_mcp" / "settings.py").read_text())
    assert settings.HOME_VARIABLE in names
    assert [name for name in names if f"`{name}`" not in text] == []


def test_every_command_is_told_of(text: str) -> None:
    told = {
        " ".join(line.split()[:2]) if line.startswith("models") else line.split()[0] for line in command_lines(text)
    }
    assert told >= {
        "serve", "demo", "convert", "export", "generate", "evaluate", "compare-kv", "plan", "models ls", "models show",
        "models verify", "models rm", "mlx-lm", "doctor",
    }  # fmt: skip


def test_every_command_line_with_options_is_taken(text: str) -> None:
    lines = [line for line in command_lines(text) if "--" in line and "..." not in line]
    assert len(lines) >= 6
    for line in lines:
        build_parser().parse_args(shlex.split(line))
