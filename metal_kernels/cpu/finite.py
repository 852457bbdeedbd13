"""Counting values that are no numbers, in one call that threads can make beside others."""

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray


def count_not_finite(words: NDArray[Any], exponent: int) -> int:
    """How many floats are NaN or infinite: words uint16 or uint32, their bits; exponent: the bits of its field."""
    field = words.dtype.type(exponent)
    return 0 if _greatest(words, field) < field else int(np.count_nonzero((words & field) == field))


@njit(cache=True, nogil=True)
def _greatest(words: Any, exponent: Any) -> Any:
    most = words.dtype.type(0)
    for i in range(words.shape[0]):
        here = words.dtype.type(words[i] & exponent)  # numba widens, and then uses a quarter of the lanes
        if here > most:
            most = here
    return most
