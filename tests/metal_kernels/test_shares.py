"""How tiles are shared out among threadgroups, and their blocks among simdgroups, as `source/matvec.metal` does it."""

import mlx.core as mx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from metal_kernels.gpu import warpgroup
from metal_kernels.gpu.matvec import shares, shares_of
from metal_kernels.gpu.tiles import BYTE_TABLE, TileWeight


@given(
    tiles=st.integers(1, 500),
    blocks=st.integers(1, 60),
    simdgroups=st.integers(1, 24),
    groups=st.integers(1, 132),
    most_pieces=st.integers(1, 9),
    each=st.sampled_from([1, 2]),
)
@example(tiles=3584, blocks=16, simdgroups=16, groups=132, most_pieces=2, each=2)
@example(tiles=16384, blocks=8, simdgroups=24, groups=132, most_pieces=4, each=1)
def test_every_block_is_in_one_share_and_pieces_are_enough(
    tiles: int, blocks: int, simdgroups: int, groups: int, most_pieces: int, each: int
) -> None:
    most_pieces = max(most_pieces, each)
    shared = shares(tiles, blocks, simdgroups, groups, most_pieces, each)
    assert shared.simdgroups == simdgroups and shared.pieces <= most_pieces
    even, more = divmod(tiles, shared.groups)
    assert even > 0
    for count in (even, even + 1) if more else (even,):
        of_run = each * count * blocks
        share = -(-of_run // simdgroups)
        assert simdgroups * share >= of_run
        for begin in range(0, of_run, share):
            last = min(begin + share, of_run) - 1
            assert last // blocks - begin // blocks < shared.pieces


def test_threadgroups_are_no_more_than_run_at_once_where_memory_is_enough() -> None:
    assert shares(1792, 32, 24, 132, 4).groups == 132
    assert shares(100, 16, 24, 132, 4).groups == 100
    assert shares(16384, 8, 24, 132, 4).groups == 2 * 132


def weight_of(rows: int, width: int, bits: int) -> TileWeight:
    """A weight for an NVIDIA GPU that nothing is multiplied by."""
    words = mx.zeros((-(-rows // 16), width // 256, 1), mx.uint32)
    return TileWeight(words, words, bits, 64, rows, width, 1, (0, 0, 0, 0), True)


@pytest.mark.parametrize(("nvidia", "most"), [("sm_89", 99 << 10), ("sm_90", 163 << 10)], indirect=["nvidia"])
@pytest.mark.usefixtures("nvidia")
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_sums_of_many_tiles_fit_beside_the_table(bits: int, most: int) -> None:
    weight = weight_of(16 * 8016, 4096, bits)
    for columns in (1, 2, 4, 8):
        shared = shares_of(weight, columns)
        assert BYTE_TABLE + 4 * shared.simdgroups * shared.pieces * 16 * columns <= most
        assert 4 * shared.simdgroups * shared.pieces * 16 * columns <= 48 << 10


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [
        (14336, 512, (2, 256)),
        (14336, 256, (2, 256)),
        (4096, 512, (1, 256)),
        (4096, 256, (1, 128, 3)),
        (4096, 128, (1, 64, 4)),
        (14336, 128, (1, 128, 2)),
        (14336, 64, (1, 64, 2)),
        (4096, 64, (1, 64, 4)),
        (152064, 17, (1, 64)),
        (16, 4096, (1, 64, 4)),
    ],
)
def test_warpgroups_take_as_much_at_once_as_leaves_few_multiprocessors_idle(
    rows: int, columns: int, expected: tuple[int, ...]
) -> None:
    assert warpgroup.shape_of(weight_of(rows, 4096, 3), columns) == warpgroup.Shape(*expected)


@pytest.mark.parametrize(("width", "teams"), [(256, 1), (512, 2), (1024, 4)])
def test_warpgroups_are_in_no_more_teams_than_blocks(width: int, teams: int) -> None:
    assert warpgroup.shape_of(weight_of(4096, width, 3), 64) == warpgroup.Shape(1, 64, teams)
