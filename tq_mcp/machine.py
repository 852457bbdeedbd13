"""The machine at hand, in words, as results record it."""

import os
import platform
from pathlib import Path

import mlx.core as mx

import metal_kernels


def describe() -> str:
    """The device that MLX computes on, such as "Apple M3 Max" or "Intel Xeon, 2 CPUs"."""
    if metal_kernels.device() != "cpu":
        return str(mx.device_info().get("device_name", metal_kernels.device()))
    return f"{processor()}, {usable_cpus()} CPUs"


def processor() -> str:
    """The processor's name as the system gives it."""
    table = Path("/proc/cpuinfo")
    if table.exists():
        names = [line.partition(":")[2].strip() for line in table.read_text().splitlines() if "model name" in line]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def usable_cpus() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
