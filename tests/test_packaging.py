"""What a stranger gets: the wheel, the two commands, and documents that say what is true."""

import ast
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from benchmarks.render_readme import RESULTS, render
from tq_mcp import cli

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("metal_kernels", "quant_engine", "registry", "tq_mcp")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DEMO_FILES = {
    "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json", "training.json",
}  # fmt: skip
DEMO_LIMIT_BYTES = 8_000_000


def requirement_names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^A-Za-z0-9_-]", line)[0] for line in requirements}


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("make") is None:
        pytest.skip("make is not on this machine")
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


def first_column(document: str, heading: str) -> list[str]:
    """The code spans that open the rows of the table under a heading or after a table header."""
    section = document.split(heading, 1)[1]
    rows = re.search(r"(?:^\|.*\n)+", section, re.M)
    assert rows, f"no table after {heading!r}"
    return re.findall(r"^\| `([^`]+)`", rows[0], re.M)


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Name and size of each file in a wheel built from the checkout."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    code = f"from hatchling.build import build_wheel; print(build_wheel({str(folder)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {info.filename: info.file_size for info in archive.infolist()}


class TestTheWheel:
    def test_it_holds_every_file_of_the_four_packages(self, names: dict[str, int]) -> None:
        ours = {
            str(path.relative_to(ROOT))
            for package in PACKAGES
            for path in (ROOT / package).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert ours - set(names) == set()

    def test_it_holds_nothing_else(self, names: dict[str, int]) -> None:
        assert {name.split("/")[0] for name in names} - set(PACKAGES) == {f"tq_mcp-{PROJECT['version']}.dist-info"}

    def test_it_holds_the_trained_model_within_its_limit(self, names: dict[str, int]) -> None:
        folder = "tq_mcp/demo_model/"
        sizes = {name[len(folder) :]: size for name, size in names.items() if name.startswith(folder)}
        assert set(sizes) - {"__init__.py"} == DEMO_FILES
        assert sum(sizes.values()) <= DEMO_LIMIT_BYTES

    def test_it_says_that_it_is_typed(self, names: dict[str, int]) -> None:
        assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)


class TestDependencies:
    def test_the_table_gives_a_reason_for_each_and_names_no_other(self) -> None:
        listed = first_column(CONTRIBUTING, "## Dependencies")
        assert set(listed) == requirement_names(PROJECT["dependencies"])

    def test_each_tool_of_development_is_named(self) -> None:
        section = CONTRIBUTING.split("For development:")[1]
        tools = requirement_names(PROJECT["optional-dependencies"]["dev"])
        assert {tool for tool in tools if f"`{tool}`" not in section} == set()

    def test_each_has_a_lower_and_an_upper_bound(self) -> None:
        unbound = [line for line in PROJECT["dependencies"] if ">=" not in line or ",<" not in line]
        assert unbound == []

    def test_everything_imported_is_declared(self) -> None:
        declared = {name.replace("-", "_") for name in requirement_names(PROJECT["dependencies"])}
        # These come with numba, mcp and mlx-lm, and are used through them.
        declared |= {"llvmlite", "anyio", "transformers"}
        known = declared | set(sys.stdlib_module_names) | set(PACKAGES)
        unknown: set[str] = set()
        for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    unknown |= {alias.name.split(".")[0] for alias in node.names} - known
                elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                    unknown |= {node.module.split(".")[0]} - known
        assert unknown == set()


class TestMake:
    def test_each_target_that_a_document_names_is_there(self) -> None:
        targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
        named = {name for path in DOCUMENTS for name in re.findall(r"(?:`|    )make ([a-z]+)", path.read_text())}
        assert {"demo", "test"} <= named <= targets

    def test_the_checks_run_the_commands_of_the_readme(self) -> None:
        block = README.split("## Two commands")[1]
        commands = re.findall(r"^    (make \w+)$", block, re.M)
        steps = [line.strip() for line in (ROOT / ".ci" / "run").read_text().splitlines()]
        assert commands == ["make demo", "make test"]
        assert [c for c in commands if not any(step.split(" PYTEST_ARGS")[0] == c for step in steps)] == []

    def test_the_checks_are_executable_and_stop_at_the_first_failure(self) -> None:
        script = ROOT / ".ci" / "run"
        assert os.access(script, os.X_OK)
        assert "set -euo pipefail" in script.read_text()

    def test_help_lists_the_targets(self) -> None:
        shown = make("help").stdout
        assert "make demo" in shown and "make test" in shown

    def test_a_missing_python_is_named_with_the_command_that_installs_it(self, tmp_path: Path) -> None:
        failed = make("demo", "PYTHON=", f"VENV={tmp_path / 'venv'}")
        assert failed.returncode != 0
        assert "Python 3.11 or newer is needed" in failed.stderr and "apt-get install python3" in failed.stderr

    def test_a_python_without_venv_is_named_with_the_command_that_installs_it(self, tmp_path: Path) -> None:
        python = tmp_path / "python-without-venv"
        python.write_text('#!/bin/sh\necho "No module named venv" >&2\nexit 1\n')
        python.chmod(0o755)
        failed = make("demo", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}")
        assert failed.returncode != 0
        assert "has no venv module" in failed.stderr and "apt-get install python3-venv" in failed.stderr

    def test_an_unreachable_index_is_explained(self, tmp_path: Path) -> None:
        venv = tmp_path / "venv"
        (venv / "bin").mkdir(parents=True)
        (venv / ".created").touch()
        python = venv / "bin" / "python"
        python.write_text('#!/bin/sh\necho "no route to host" >&2\nexit 1\n')
        python.chmod(0o755)
        failed = make("demo", f"VENV={venv}", "HAS_NVIDIA=")
        assert failed.returncode != 0
        assert "no route to host" in failed.stderr and "PIP_INDEX_URL" in failed.stderr
        assert not (venv / ".runtime").exists()

    def test_an_nvidia_gpu_gets_the_cuda_build_of_mlx(self, tmp_path: Path) -> None:
        planned = make("--dry-run", "demo", f"VENV={tmp_path / 'venv'}", "HAS_NVIDIA=yes").stdout
        assert "uninstall --yes mlx-cpu" in planned and "mlx[cuda13]" in planned
        assert "mlx[cuda13]" not in make("--dry-run", "demo", f"VENV={tmp_path / 'venv'}", "HAS_NVIDIA=").stdout


class TestTheDocuments:
    def test_the_readme_lists_exactly_the_commands_there_are(self) -> None:
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
            cli.main(["--help"])
        listed = re.search(r"\{([a-z,-]+)\}", shown.getvalue())
        assert listed
        named = {entry.split()[1] for entry in first_column(README, "## At the command line")}
        assert named == set(listed[1].split(","))

    def test_every_path_in_the_tree_of_the_readme_exists(self) -> None:
        tree = re.search(r"## What is where\n\n```\n(.*?)```", README, re.S)
        assert tree
        parent, missing = "", []
        for line in tree[1].splitlines():
            name = line.split()[0]
            path = name if not line.startswith(" ") else parent + name
            parent = parent if line.startswith(" ") else name
            missing += [path] if not (ROOT / path).is_dir() else []
        assert missing == []

    @pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
    def test_links_lead_somewhere(self, path: Path) -> None:
        links = re.findall(r"\]\(([^)#]+)\)", path.read_text())
        broken = [link for link in links if "://" not in link and not (path.parent / link).exists()]
        assert broken == []

    def test_the_snippets_for_clients_are_json_and_start_the_server(self) -> None:
        snippets = [json.loads(text) for text in re.findall(r"```json\n(.*?)```", README, re.S)]
        servers = [s.get("mcpServers", s.get("servers"))["turboquant"] for s in snippets]
        assert [server["args"] for server in servers] == [["serve"], ["serve"]]

    def test_the_python_in_the_readme_imports_what_exists(self) -> None:
        (snippet,) = re.findall(r"```python\n(.*?)```", README, re.S)
        imports = [n for n in ast.parse(snippet).body if isinstance(n, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), "README.md", "exec"), {})

    def test_the_results_in_the_readme_are_those_of_the_benchmarks(self) -> None:
        assert render(README, RESULTS) == README, "run benchmarks/render_readme.py"

    def test_the_changelog_has_the_version(self) -> None:
        assert f"## [{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text()
