"""Signs and blockwise Hadamard transforms on a GPU, and activations made ready for products with tiles."""

from dataclasses import dataclass
from typing import cast

import mlx.core as mx

from metal_kernels.errors import KernelError
from metal_kernels.gpu.fixed import factors
from metal_kernels.gpu.tiles import BLOCK_COLUMNS
from metal_kernels.launch import Kernel

MOST_THREADS = 1024
MOST_VALUES = 64
"""Values that a thread holds in registers."""
MOST_EXCHANGED = 4096
"""Values in threadgroup memory at the same time."""
EACH = 16
"""Values that a thread turns, if it can."""
FEW_BLOCKS = 16
"""Up to so many blocks with an odd factor are shared out to threadgroups, one for each run of them."""
IN_ROWS, IN_RUNS, IN_PIECES = 0, 1, 2
"""How results lie, see `place_of` in activations.metal."""
PIECE_ROWS = 256
"""Four pieces of 64 rows, which a warpgroup multiplies by at once."""

ROTATE = Kernel(
    name="turboquant_rotate",
    sources=("hadamard.metal",),
    inputs=("x", "fixed"),
    outputs=("out",),
    least_threads=512,
)
"""Two threadgroups of 256 hide each other's waiting, which is worth the few registers that 28 runs lack then."""


@dataclass(frozen=True, eq=False)
class Activations:
    """n rotated activations as float16, one array for a launch: n * parts rows of `padded` halves, then, scaled, for
    each row the exponent of the factor that restores it, as `Factors` in activations.metal reads it.

    halves is (n, enough), by 32 columns or in pieces, of as many rows as whole `PIECE_ROWS` make, in the order that
    `place_of` says. With two parts, of float32 activations, a row and what its rounding lost are two rows.
    """

    halves: mx.array
    parts: int
    scaled: bool
    in_pieces: bool = False

    @property
    def n(self) -> int:
        """Rows of activations."""
        return self.halves.shape[0]

    @property
    def constants(self) -> dict[str, int | bool | mx.Dtype]:
        """The compile-time values of reading them."""
        return {"PARTS": self.parts, "SCALED": self.scaled}


def rotate(x: mx.array, fixed: mx.array, block: int) -> mx.array:
    """x (n, width) rotated, in its dtype; fixed from `fixed_words`."""
    n, width = x.shape
    constants = _constants(n, width, x.dtype, block) | {
        "PARTS": 0,
        "SCALED": False,
        "KIND": 0,
        "ORDER": IN_ROWS,
        "PADDED": width,
        "OUT": x.dtype,
    }
    return _launch(x, fixed, constants, (n, width))


def prepare(x: mx.array, fixed: mx.array, block: int, gated: bool = False, in_pieces: bool = False) -> Activations:
    """Rotate x (n, width) and turn it into halves; gated: x is (n, 2 * width) and silu(x[:, :width]) * x[:, width:]
    is rotated.

    A row of bfloat16 or float32 is scaled by a power of two so that it neither overflows nor loses what matters to
    underflow; float32 goes to two halves, 22 bits of its 24.
    """
    n, width = x.shape[0], x.shape[1] // 2 if gated else x.shape[1]
    scaled, padded = x.dtype != mx.float16, -(-width // BLOCK_COLUMNS) * BLOCK_COLUMNS
    parts = 2 if x.dtype == mx.float32 else 1
    constants = _constants(n, width, x.dtype, block) | {
        "PARTS": parts,
        "SCALED": scaled,
        "KIND": int(gated),
        "ORDER": IN_PIECES if in_pieces else IN_RUNS,
        "PADDED": padded,
        "OUT": mx.float16,
    }
    rows = -(-n * parts // PIECE_ROWS) * PIECE_ROWS if in_pieces else n * parts
    each = -(-rows * padded // n) + int(scaled)
    return Activations(_launch(x, fixed, constants, (n, each)), parts, scaled, in_pieces)


def fits(block: int) -> bool:
    """Whether the kernel transforms blocks of this size."""
    odd, power = factors(block)
    return odd * max(1, power // MOST_THREADS) <= MOST_VALUES


def _constants(n: int, width: int, dtype: mx.Dtype, block: int) -> dict[str, int | bool | mx.Dtype]:
    """The kernel's compile-time values; block 1, no transform, goes in runs of what power of two divides the width."""
    odd, power = factors(block)
    power = power if block > 1 else min(width & -width, MOST_THREADS)
    if not fits(block):
        raise KernelError(
            f"a Hadamard block of {block} is more than the GPU kernel takes ({MOST_VALUES * MOST_THREADS}); "
            "use the reference backend"
        )
    shared_out = odd > 1 and n * width <= FEW_BLOCKS * block
    each = min(EACH, 1 << (MOST_VALUES // odd).bit_length() - 1)
    threads = min(max(power // each, 32), MOST_THREADS)
    runs = 1 if shared_out else odd
    return {
        "T": dtype, "ODD": odd, "POWER": power, "THREADS": threads, "TRANSFORM": block > 1, "WIDTH": width,
        "AT_ONCE": min(runs * max(1, power // threads), MOST_EXCHANGED // threads), "SHARED_OUT": shared_out,
    }  # fmt: skip


def _launch(
    x: mx.array, fixed: mx.array, constants: dict[str, int | bool | mx.Dtype], shape: tuple[int, int]
) -> mx.array:
    odd, power, threads = (int(constants[name]) for name in ("ODD", "POWER", "THREADS"))  # pyright: ignore[reportArgumentType]
    run = power if constants["SHARED_OUT"] else odd * power
    groups = x.shape[0] * int(constants["WIDTH"]) // run  # pyright: ignore[reportArgumentType]
    out = shape, cast(mx.Dtype, constants["OUT"])
    return ROTATE.launch([x, fixed], [out], (groups, 1), threads, constants)[0]
