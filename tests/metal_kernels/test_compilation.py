import numpy as np
from numba import njit

from metal_kernels import announce_compilation


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
