import importlib
import pkgutil

import numpy as np
from numba import njit
from numba.core.dispatcher import Dispatcher

from metal_kernels import announce_compilation, cpu


def test_the_first_compilation_is_announced_once() -> None:
    told: list[str] = []
    first, second = njit(lambda x: x + 1), njit(lambda x: x + 2)
    with announce_compilation(told.append):
        assert first(np.float32(1)) == 2
        assert second(np.float32(1)) == 3
        assert first(np.float32(1)) == 2
    assert len(told) == 1
    assert "compiling" in told[0]


def test_nothing_is_said_of_what_is_compiled_already() -> None:
    told: list[str] = []
    function = njit(lambda x: x + 3)
    function(np.float32(1))
    with announce_compilation(told.append):
        function(np.float32(1))
    assert told == []


def test_what_may_reorder_float_arithmetic_is_inlined() -> None:
    """Or a process that compiles its callers finds other bits than one that loads them."""
    modules = [
        importlib.import_module(f"{cpu.__name__}.{module.name}") for module in pkgutil.iter_modules(cpu.__path__)
    ]
    functions = [f for module in modules for f in vars(module).values() if isinstance(f, Dispatcher)]
    loose = [f for f in functions if f.targetoptions.get("fastmath") and not f.targetoptions.get("parallel")]
    assert len(loose) > 10
    assert not [f.py_func.__qualname__ for f in loose if not f.targetoptions.get("forceinline")]
