"""An NVIDIA GPU's architecture, and what it has for kernels."""

import re
from functools import cache

import mlx.core as mx

from metal_kernels.launch import Dialect

OLDEST = 80
"""The first that has all instructions of the kernels, sm_80. MLX itself runs on sm_75 too."""
SMALL = frozenset({"sm_86", "sm_89", "sm_120", "sm_121"})
"""Architectures that give a threadgroup 99 KB; those made for data centres give 163 or 227."""


@cache
def architecture() -> str:
    """Such as sm_90; nothing where MLX has no NVIDIA GPU."""
    return str(mx.device_info(mx.Device(mx.gpu)).get("architecture", "")) if mx.cuda.is_available() else ""


@cache
def fault() -> str:
    """Why kernels cannot run on this GPU, or nothing."""
    number = re.fullmatch(r"sm_(\d+)\w?", architecture())
    if number is None or int(number[1]) >= OLDEST:
        return ""
    return f"this GPU is {architecture()}, and they are written for sm_{OLDEST} and later"


def is_hopper() -> bool:
    """Whether MLX has a GPU whose warpgroups multiply, which is no other's."""
    return architecture().startswith("sm_90")


def memory_of(gpu: Dialect) -> int:
    """Bytes of threadgroup memory that a product of few rows has, on NVIDIA beside a table of bytes."""
    if gpu != "cuda":
        return 32 << 10
    return (34 if architecture() in SMALL else 48) << 10
