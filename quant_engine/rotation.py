"""Random signs and the choice of Hadamard block: the rotation that makes every coordinate look Gaussian."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from metal_kernels import HADAMARD_FACTORS, hadamard_block
from quant_engine.config import ROTATIONS
from quant_engine.errors import RecipeError

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


def signs(width: int, seed: int) -> NDArray[np.float32]:
    """`width` random signs, float32 (width,) of +1 and -1, read-only. The same on every machine and version.

    Sign i depends on (seed, i) alone. In arithmetic modulo 2^64, with G = 0x9E3779B97F4A7C15:

        mix(z): z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9; z = (z ^ z >> 27) * 0x94D049BB133111EB; z = z ^ z >>
        31 sign i is -1 where the highest bit of mix(mix(seed + G) + (i + 1) * G) is 1, otherwise +1

    which is the stream of SplitMix64 (Steele, Lea and Flood, 2014) started at mix(seed + G). Layers of the
    same width share their signs, so that layers which read the same input share its rotation.
    """
    return _signs(width, seed)


@lru_cache(maxsize=64)
def _signs(width: int, seed: int) -> NDArray[np.float32]:
    start = np.uint64(int(_mix(np.array([(seed + _GOLDEN) & _MASK], dtype=np.uint64))[0]))
    counters = np.arange(1, width + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + start
    drawn = np.where(_mix(counters) >> np.uint64(63), -1.0, 1.0).astype(np.float32)
    drawn.setflags(write=False)
    return drawn


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def choose_block(width: int, method: str) -> int:
    """The size of the Hadamard blocks that rotate rows of `width`, for one of `config.ROTATIONS`.

    "hadamard" needs the whole width to be m * 2^k with m in 1, 12, 20, 28; "blockwise_hadamard" and "auto"
    take the largest such size that divides it (2880: nine blocks of 320); "none" is 1. Raises RecipeError.
    """
    if method not in ROTATIONS:
        raise RecipeError(f"rotation {method!r}; choose one of {', '.join(ROTATIONS)}")
    if method == "none":
        return 1
    block = hadamard_block(width)
    if method == "hadamard" and block != width:
        factors = ", ".join(str(m) for m in sorted(HADAMARD_FACTORS))
        raise RecipeError(
            f"no Hadamard matrix of {width} (sizes are m * 2^k with m in {factors}); "
            f"use rotation 'auto' or 'blockwise_hadamard', which takes blocks of {block}"
        )
    return block
