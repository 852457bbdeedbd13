"""How tiles are shared out among threadgroups, and their blocks among simdgroups, as `source/matvec.metal` does it."""

from hypothesis import example, given
from hypothesis import strategies as st

from metal_kernels.gpu.matvec import shares


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
    shared = shares(tiles, blocks, simdgroups, groups, most_pieces, each)
    assert shared.simdgroups == simdgroups and shared.pieces <= max(most_pieces, each)
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
