import numpy as np
import pytest

from quant_engine.errors import RecipeError
from quant_engine.rotation import choose_block, signs

GOLDEN = {
    0: "--+--+-++-+++--+",
    1: "+-+-+--+",
}


def _as_text(values: np.ndarray) -> str:
    return "".join("+" if value > 0 else "-" for value in values)


def _splitmix(seed: int, index: int) -> float:
    """The docstring's formula in plain Python integers."""
    mask, golden = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return z ^ (z >> 31)

    return -1.0 if mix((mix((seed + golden) & mask) + (index + 1) * golden) & mask) >> 63 else 1.0


@pytest.mark.parametrize("seed", GOLDEN)
def test_signs_are_the_golden_ones_that_files_depend_on(seed: int) -> None:
    assert _as_text(signs(len(GOLDEN[seed]), seed)) == GOLDEN[seed]


@pytest.mark.parametrize("seed", [0, 1, 42, 2**63 - 1])
def test_signs_follow_the_documented_hash(seed: int) -> None:
    assert signs(257, seed).tolist() == [_splitmix(seed, i) for i in range(257)]


def test_a_sign_depends_on_the_seed_and_its_index_not_on_the_width() -> None:
    np.testing.assert_array_equal(signs(64, 5), signs(4096, 5)[:64])
    assert (signs(4096, 5) != signs(4096, 6)).mean() == pytest.approx(0.5, abs=0.05)


def test_signs_are_balanced_and_uncorrelated() -> None:
    drawn = signs(65_536, 3)
    assert abs(drawn.mean()) < 4 / 256
    assert abs((drawn[1:] * drawn[:-1]).mean()) < 4 / 256


def test_shared_signs_cannot_be_written_to() -> None:
    with pytest.raises(ValueError, match="read-only"):
        signs(32, 0)[0] = 5


@pytest.mark.parametrize(
    ("width", "block"),
    [
        (512, 512),
        (1536, 1536),
        (2880, 320),
        (576, 192),
        (4096, 4096),
        (14336, 14336),
        (18944, 512),
        (11008, 256),
        (7, 1),
    ],
)
def test_auto_takes_the_largest_block_that_divides_the_width(width: int, block: int) -> None:
    assert choose_block(width, "auto") == choose_block(width, "blockwise_hadamard") == block


def test_a_whole_rotation_is_refused_where_no_matrix_of_that_size_exists() -> None:
    assert choose_block(1536, "hadamard") == 1536
    with pytest.raises(RecipeError, match=r"no Hadamard matrix of 2880 .* blocks of 320"):
        choose_block(2880, "hadamard")


def test_no_rotation_is_blocks_of_one() -> None:
    assert choose_block(2880, "none") == 1


def test_an_unknown_rotation_is_refused() -> None:
    with pytest.raises(RecipeError, match="rotation 'qr'; choose one of auto, hadamard"):
        choose_block(64, "qr")
