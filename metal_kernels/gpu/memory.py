"""Threadgroup memory that a product of few rows has, on NVIDIA beside a table of bytes."""

from functools import cache

import mlx.core as mx

from metal_kernels.launch import Dialect

SMALL = frozenset({"sm_86", "sm_89", "sm_120", "sm_121"})
"""Architectures that give a threadgroup 99 KB; those made for data centres give 163 or 227."""


@cache
def memory_of(gpu: Dialect) -> int:
    """Bytes."""
    if gpu != "cuda":
        return 32 << 10
    small = mx.cuda.is_available() and mx.device_info(mx.Device(mx.gpu)).get("architecture") in SMALL
    return (34 if small else 48) << 10
