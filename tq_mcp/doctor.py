"""What is installed, what MLX computes on, and what is missing with the command that installs it.

Nothing heavy is imported at the top: a doctor has to answer where other packages are broken or missing.
"""

import importlib
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import psutil

from tq_mcp.schemas import Diagnosis, Problem
from tq_mcp.settings import Settings

PACKAGE = "tq-mcp"
NEEDED = ("mlx", "mlx-lm", "numba", "numpy", "sqlalchemy", "alembic", "mcp", "huggingface-hub")
LITTLE_DISK_BYTES = 2_000_000_000
CUDA_REMEDY = "pip uninstall -y mlx-cpu && pip install 'mlx[cuda13]'"


def diagnose(settings: Settings) -> Diagnosis:
    """Look at everything; changes nothing."""
    problems = [
        Problem(what=f"the package {name} is not installed", remedy=f"pip install '{_requirement(name)}'")
        for name in NEEDED
        if _version(name) is None
    ]
    device, backend, blas = _compute(problems)
    registry, count = _registry(settings, problems)
    memory, free = psutil.virtual_memory(), shutil.disk_usage(_existing(settings.home)).free
    if free < LITTLE_DISK_BYTES:
        what = f"{free / 1e9:.1f} GB are free where {settings.home} is"
        problems.append(Problem(what=what, remedy="free space, or use --home DIR"))
    return Diagnosis(
        version=_version(PACKAGE) or "unknown",
        platform=platform.platform(),
        processor=_attribute("tq_mcp.machine", "processor") or platform.machine(),
        cpu_count=_attribute("tq_mcp.machine", "usable_cpus") or os.cpu_count() or 1,
        memory_total_bytes=memory.total,
        memory_available_bytes=memory.available,
        python=platform.python_version(),
        mlx=_version("mlx"),
        mlx_lm=_version("mlx-lm"),
        device=device,
        backend=backend,
        numba=_version("numba"),
        blas=blas,
        home=str(settings.home),
        disk_free_bytes=free,
        registry=registry,
        registered_models=count,
        problems=problems,
    )


def _compute(problems: list[Problem]) -> tuple[str | None, str | None, str | None]:
    """Device, kernels and BLAS."""
    try:
        kernels: Any = importlib.import_module("metal_kernels")
        machine: Any = importlib.import_module("tq_mcp.machine")
        device: str = kernels.device()
        described = device if device == "cpu" else f"{device}: {machine.describe()}"
        own = importlib.import_module("metal_kernels.dispatch").has_kernel("matmul")
    except Exception as error:  # whatever a broken installation raises
        remedy = f"pip install --force-reinstall '{_requirement('mlx')}'"
        problems.append(Problem(what=f"MLX cannot be used: {error}", remedy=remedy))
        return None, None, None
    if device == "cpu" and has_nvidia_gpu():
        problems.append(Problem(what="an NVIDIA GPU is there and MLX computes on the CPU", remedy=CUDA_REMEDY))
    if device == "cpu" and platform.system() == "Darwin" and platform.machine() != "arm64":
        problems.append(
            Problem(what="this Python runs as Intel code, without Metal", remedy="use a Python built for Apple silicon")
        )
    backend = kernels.active_backend() if own else f"reference operations on {device}"
    return described, backend, _blas()


def has_nvidia_gpu() -> bool:
    """Whether the driver of an NVIDIA GPU is loaded."""
    return Path("/proc/driver/nvidia/version").exists()


def _registry(settings: Settings, problems: list[Problem]) -> tuple[str, int | None]:
    if not settings.home.exists():
        return "none yet; the first conversion makes it", 0
    try:
        registry: Any = importlib.import_module("registry")
        with registry.open_registry(settings.home) as opened:
            count: int = opened.models(limit=1).total
            mended = [f"{found.name} was {found.action}" for found in opened.recovered]
    except Exception as error:
        problems.append(Problem(what=str(error), remedy="use another home: --home DIR"))
        return "cannot be opened", None
    return ", ".join([f"{count} models", *mended]), count


def _blas() -> str | None:
    """The library behind NumPy's matrix products."""
    numpy: Any = importlib.import_module("numpy")
    found: Any = numpy.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return f"{found['name']} {found['version']}"


def _attribute(module: str, function: str) -> Any:
    try:
        return getattr(importlib.import_module(module), function)()
    except ImportError:
        return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _requirement(name: str) -> str:
    """The package with the versions that this one needs."""
    try:
        lines = requires(PACKAGE) or []
    except PackageNotFoundError:
        return name
    named = (line.partition(";")[0].strip() for line in lines)
    return next((line for line in named if line.partition(">")[0].partition("[")[0] == name), name)


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(parent for parent in (path, *path.parents) if parent.exists())
