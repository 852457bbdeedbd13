"""The shape of the code: which way imports go, that importing does nothing, and that files stay small."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("metal_kernels", "quant_engine", "registry", "tq_mcp")

SIBLINGS = {
    "metal_kernels": set[str](),
    "registry": set[str](),
    "quant_engine": {"metal_kernels"},
    "tq_mcp": {"metal_kernels", "quant_engine", "registry"},
}
THIRD_PARTY = {
    "metal_kernels": {"mlx", "numpy", "numba", "llvmlite"},
    "registry": {"sqlalchemy", "alembic"},
    "quant_engine": {"mlx", "mlx_lm", "numpy", "numba", "huggingface_hub", "psutil", "transformers"},
    "tq_mcp": {"mcp", "pydantic", "rich", "psutil", "mlx", "anyio", "huggingface_hub"},
}
ADAPTER = "quant_engine.mlx_lm_adapter"
MLX_LM_PUBLIC = {"mlx_lm", "mlx_lm.models.cache", "mlx_lm.sample_utils", "mlx_lm.utils", "mlx_lm.generate"}
ENVIRONMENT_READERS = {"tq_mcp.settings"}
LONGEST_FILE_LINES = 400


@dataclass(frozen=True)
class Import:
    """One imported module, by absolute name; `runtime` is false under TYPE_CHECKING."""

    target: str
    line: int
    in_function: bool
    runtime: bool


@dataclass(frozen=True)
class Module:
    name: str
    path: Path
    tree: ast.Module

    @property
    def package(self) -> str:
        return self.name.split(".")[0]

    @property
    def anchor(self) -> str:
        """The package that relative imports start from."""
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]


def modules(root: Path, packages: tuple[str, ...] = PACKAGES) -> list[Module]:
    found: list[Module] = []
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found.append(Module(name, path, ast.parse(path.read_text())))
    return found


def imports(module: Module) -> list[Import]:
    return list(_imports(module, module.tree, in_function=False, runtime=True))


def _imports(module: Module, node: ast.AST, in_function: bool, runtime: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, in_function, runtime)
        elif isinstance(child, ast.ImportFrom):
            base = _absolute(module, child)
            for alias in child.names:
                yield Import(f"{base}.{alias.name}", child.lineno, in_function, runtime)
        else:
            inside = in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from _imports(module, child, inside, runtime and not typing_only)


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = module.anchor.split(".")
    kept = parts[: len(parts) - node.level + 1]
    return ".".join([*kept, *([node.module] if node.module else [])])


def graph(found: list[Module]) -> dict[str, set[str]]:
    """Which module needs which when it is imported; `from a import b` needs a.b where that is a module."""
    names = {module.name for module in found}
    edges: dict[str, set[str]] = {module.name: set() for module in found}
    for module in found:
        for item in imports(module):
            target = item.target if item.target in names else item.target.rpartition(".")[0]
            if item.runtime and target in names and target != module.name:
                edges[module.name].add(target)
    return edges


def find_cycle(edges: dict[str, set[str]]) -> list[str] | None:
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str] | None:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        for target in sorted(edges[name]):
            if cycle := walk(target, [*path, name]):
                return cycle
        done.add(name)
        return None

    for name in sorted(edges):
        if cycle := walk(name, []):
            return cycle
    return None


def environment_reads(module: Module) -> list[str]:
    return [
        f"{module.name}:{node.lineno}"
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv", "os.putenv")
    ]


def wrong_directions(found: list[Module]) -> list[str]:
    wrong: list[str] = []
    for module in found:
        for item in imports(module):
            top = item.target.split(".")[0]
            allowed = SIBLINGS[module.package] | THIRD_PARTY[module.package] | {module.package}
            if top not in allowed and top not in sys.stdlib_module_names:
                wrong.append(f"{module.name}:{item.line} imports {item.target}")
    return wrong


@pytest.fixture(scope="module")
def ours() -> list[Module]:
    found = modules(ROOT)
    assert {module.package for module in found} == set(PACKAGES)
    return found


def test_each_package_imports_only_what_its_place_allows(ours: list[Module]) -> None:
    assert wrong_directions(ours) == []


def test_no_module_imports_itself_through_others(ours: list[Module]) -> None:
    assert find_cycle(graph(ours)) is None


def test_our_packages_are_imported_at_the_top_of_files(ours: list[Module]) -> None:
    hidden = [
        f"{module.name}:{item.line} imports {item.target} inside a function"
        for module in ours
        for item in imports(module)
        if item.in_function and item.target.split(".")[0] in PACKAGES
    ]
    assert hidden == []


def test_only_the_adapter_touches_the_inside_of_mlx_lm(ours: list[Module]) -> None:
    inside = [
        f"{module.name}:{item.line} imports {item.target}"
        for module in ours
        for item in imports(module)
        if module.name != ADAPTER
        and item.target.split(".")[0] == "mlx_lm"
        and item.target not in MLX_LM_PUBLIC
        and item.target.rpartition(".")[0] not in MLX_LM_PUBLIC
    ]
    assert inside == []


def test_the_environment_is_read_in_one_place(ours: list[Module]) -> None:
    reads = [read for module in ours if module.name not in ENVIRONMENT_READERS for read in environment_reads(module)]
    assert reads == []


def test_files_stay_short(ours: list[Module]) -> None:
    paths = [m.path for m in ours] + [*ROOT.glob("tests/**/*.py"), *ROOT.glob("examples/*.py")]
    sizes = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in paths}
    assert {name: size for name, size in sizes.items() if size > LONGEST_FILE_LINES} == {}


WITHOUT = """
import importlib, pkgutil, sys

class Without:
    "A finder that does not find some packages, as if they were not installed."
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {blocked} else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path = [Without(finder) for finder in sys.meta_path]
for package in {packages}:
    module = importlib.import_module(package)
    for info in pkgutil.walk_packages(module.__path__, package + "."):
        if "migrations.versions" not in info.name and not info.name.endswith(("__main__", "migrations.env")):
            importlib.import_module(info.name)
"""

SIDE_EFFECTS = """
import logging, os, pathlib, signal, sys, threading, warnings
import mlx.core, mlx.nn, mlx_lm.generate, mlx_lm.utils, types

def state():
    watched = [sys.modules[name] for name in THEIRS]
    names = {
        (m.__name__, n): id(v) for m in watched for n, v in vars(m).items()
        if not n.startswith("__") and not isinstance(v, types.ModuleType)
    }
    methods = {
        (c.__name__, n): id(v)
        for m in watched for c in vars(m).values() if isinstance(c, type) for n, v in vars(c).items()
        if not n.startswith("__")
    }
    return dict(
        environment=dict(os.environ), handlers=list(logging.getLogger().handlers),
        level=logging.getLogger().level, directory=os.getcwd(),
        files=sorted(map(str, pathlib.Path(".").rglob("*"))), interrupt=signal.getsignal(signal.SIGINT),
        threads=threading.active_count(), names=names, methods=methods,
    )

THEIRS = {n for n in sys.modules if n.split(".")[0] in ("mlx", "mlx_lm")}
before = state()
IMPORT
after = state()
for what in before:
    if before[what] != after[what]:
        if isinstance(before[what], dict):
            keys = {k for k in {**before[what], **after[what]} if before[what].get(k) != after[what].get(k)}
            sys.exit(f"importing changed {what}: {sorted(keys)}"[:2000])
        sys.exit(f"importing changed {what}: {before[what]} -> {after[what]}"[:2000])
"""


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that finds the packages in the checkout."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("packages", "blocked"),
    [
        (["metal_kernels", "quant_engine"], ["sqlalchemy", "alembic", "mcp", "rich", "registry", "tq_mcp"]),
        (["metal_kernels"], ["mlx_lm", "transformers", "quant_engine"]),
        (["registry"], ["mlx", "mlx_lm", "mcp", "numba", "quant_engine", "metal_kernels", "tq_mcp"]),
    ],
    ids=["engine and kernels without server and registry", "kernels alone", "registry alone"],
)
def test_packages_import_without_what_they_do_not_need(packages: list[str], blocked: list[str], tmp_path: Path) -> None:
    code = WITHOUT.replace("{blocked}", repr(set(blocked))).replace("{packages}", repr(packages))
    finished = run_python(code, tmp_path)
    assert finished.returncode == 0, finished.stderr


def test_importing_does_nothing_else(tmp_path: Path) -> None:
    finished = run_python(SIDE_EFFECTS.replace("IMPORT", f"import {', '.join(PACKAGES)}, tq_mcp.cli"), tmp_path)
    assert finished.returncode == 0, finished.stderr


class TestTheChecksThemselves:
    """Each check finds the mistake that it is there for."""

    @staticmethod
    def tree(folder: Path, **files: str) -> list[Module]:
        for name, text in files.items():
            path = folder / (name.replace("__in__", "/") + ".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return modules(folder)

    def test_an_upward_import_is_found(self, tmp_path: Path) -> None:
        found = self.tree(tmp_path, metal_kernels__in__a="import quant_engine.config")
        assert wrong_directions(found) == ["metal_kernels.a:1 imports quant_engine.config"]

    def test_a_relative_import_is_resolved(self, tmp_path: Path) -> None:
        found = self.tree(tmp_path, quant_engine__in__cpu__in__a="from ..b import c")
        assert [item.target for item in imports(found[0])] == ["quant_engine.b.c"]

    def test_a_cycle_is_found(self, tmp_path: Path) -> None:
        found = self.tree(tmp_path, registry__in__a="from registry.b import x", registry__in__b="from . import a")
        assert find_cycle(graph(found)) == ["registry.a", "registry.b", "registry.a"]

    def test_an_import_inside_a_method_is_found(self, tmp_path: Path) -> None:
        found = self.tree(tmp_path, tq_mcp__in__a="class A:\n    def f(self):\n        import registry")
        assert [item.in_function for item in imports(found[0])] == [True]

    def test_an_environment_read_is_found(self, tmp_path: Path) -> None:
        found = self.tree(tmp_path, tq_mcp__in__a="import os\nHOME = os.environ['HOME']")
        assert environment_reads(found[0]) == ["tq_mcp.a:2"]

    def test_a_package_that_is_not_there_is_missed(self, tmp_path: Path) -> None:
        code = WITHOUT.replace("{blocked}", "{'wave'}").replace("{packages}", "['wave']")
        assert "No module named 'wave'" in run_python(code, tmp_path).stderr

    def test_a_side_effect_is_found(self, tmp_path: Path) -> None:
        patched = SIDE_EFFECTS.replace("IMPORT", "mlx.nn.Linear.__call__ = len; mlx_lm.load = len")
        assert "importing changed names" in run_python(patched, tmp_path).stderr
