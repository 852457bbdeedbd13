"""The threads under numba: Intel's TBB where its package is, since OpenMP's threads spin and starve all others."""

import ctypes
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution

FEW_VALUES = 2**14
"""Up to these a second thread takes longer to begin than to help, where a value takes a nanosecond or so."""


@cache
def prepare_threads() -> None:
    """Load TBB's library, which numba then prefers; must come before the first parallel kernel runs.

    With OpenMP, threads that wait burn their core, and on two busy cores decoding fell from 90 tokens a second to 4.
    """
    try:
        files = distribution("tbb").files or []
    except PackageNotFoundError:
        return
    for file in files:
        if file.name in ("libtbb.so.12", "libtbb.12.dylib"):
            ctypes.CDLL(str(file.locate()), mode=ctypes.RTLD_GLOBAL)
