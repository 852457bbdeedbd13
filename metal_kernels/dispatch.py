"""Which backend runs an operation, and a record of what really ran.

A backend is the kind of kernel, not the device: "metal" and "cuda" are GPU kernels, "cpu" numba and BLAS,
"reference" plain MLX operations on whatever device MLX uses. `active_backend` is the one choice, `kernel_backend`
the one decision for each operation; a backend that was forced and has no kernel for an operation is an error.
"""

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Literal, get_args

import mlx.core as mx

from metal_kernels.cpu.threads import prepare_threads
from metal_kernels.errors import KernelError
from metal_kernels.gpu.architecture import fault
from metal_kernels.gpu.probe import works
from metal_kernels.gpu.products import GPUS

Backend = Literal["metal", "cuda", "cpu", "reference"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

_UNTRIED = frozenset(
    ["matmul", "expert_matmul", "feed_forward", "packed_attention", "pack_cache", "quantize", "decode_attention"]
)
_GPU = _UNTRIED | {"decoder_layer"}
_KERNELS: dict[Backend, frozenset[str]] = {
    "metal": _GPU,
    "cuda": _GPU,
    "cpu": frozenset(
        [
            *("rotate", "quantize", "matmul", "dense", "affine", "expert_matmul", "feed_forward", "swiglu", "rms_norm"),
            *("attention", "packed_attention", "pack_cache", "decoder_layer"),
        ]
    ),
}

_forced: ContextVar[Backend | None] = ContextVar("forced_backend", default=None)
_ran: set[str] = set()


def device() -> Literal["metal", "cuda", "cpu"]:
    """The device that MLX computes on."""
    if mx.default_device() == mx.Device(mx.cpu):
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def active_backend() -> Backend:
    """The backend in force: the forced one, otherwise that of MLX's default device."""
    return _forced.get() or device()


@contextmanager
def use_backend(name: str) -> Generator[None]:
    """Force a backend within the block; raises KernelError where it cannot run on this machine's device."""
    if name not in BACKENDS:
        raise KernelError(f"no backend named {name!r}; choose from {', '.join(BACKENDS)}")
    if name not in ("reference", device()):
        raise KernelError(
            f"the {name} backend needs MLX on a {name} device, and MLX runs on {device()} here; "
            "use 'reference', or mx.set_default_device"
        )
    if name == "cuda" and (reason := fault()):
        raise KernelError(f"the kernels of the cuda backend cannot run: {reason}; use 'reference'")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def kernel_backend(operation: str, *, gpu_fits: bool = True) -> Backend | None:
    """The active backend if it has its own kernel for `operation`, else None; records which path runs.

    gpu_fits: whether a GPU's kernel takes these arguments. Where no backend is forced, an operation without a kernel
    runs on the reference operations, and the record says so. Raises KernelError where a backend is forced and lacks it.
    """
    backend = active_backend()
    fits = gpu_fits or backend not in GPUS
    if fits and operation in _KERNELS.get(backend, frozenset()) and _works(backend, operation):
        if backend == "cpu":
            prepare_threads()
        record(backend, operation)
        return backend
    if _forced.get() not in (None, "reference"):
        raise KernelError(f"the {backend} backend has no kernel for {operation}; use 'reference' for it")
    record("reference", operation)
    return None


def has_kernel(operation: str) -> bool:
    """Whether the active backend has its own kernel for `operation`; see `kernel_backend`."""
    return kernel_backend(operation) is not None


def _works(backend: Backend, operation: str) -> bool:
    """Whether a kernel works here as far as that is in doubt.

    None has run on Apple's GPUs yet, so each is tried there; NVIDIA's oldest that MLX runs on lack instructions.
    """
    if backend == "cuda" and (reason := fault()):
        _warn(reason)
        return False
    return backend != "metal" or operation not in _UNTRIED or works(operation, "metal")


@cache
def _warn(reason: str) -> None:
    warnings.warn(
        f"the kernels for NVIDIA cannot run: {reason}. MLX's own operations take their place, which are slower",
        RuntimeWarning,
        stacklevel=2,
    )


def record(backend: Backend, operation: str) -> None:
    """Note that an operation ran on a backend."""
    _ran.add(f"{backend}:{operation}")


def reset_paths() -> None:
    """Forget what ran so far."""
    _ran.clear()


def kernel_path() -> str:
    """What ran since `reset_paths`, such as "cpu:dense,matmul" or "reference:matmul,rotate on cuda"."""
    if not _ran:
        return f"mlx on {device()}"
    by_backend: dict[str, list[str]] = {}
    for entry in sorted(_ran):
        backend, operation = entry.split(":")
        by_backend.setdefault(backend, []).append(operation)
    return "; ".join(
        f"{backend}:{','.join(operations)}" + (f" on {device()}" if backend == "reference" else "")
        for backend, operations in by_backend.items()
    )
