import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metal_kernels import ShapeError, bits_of, groups, hadamard_block, pack, unpack, words


@given(bits=st.sampled_from([1, 2, 3, 4, 8]), rows=st.integers(1, 4), blocks=st.integers(1, 5), seed=st.integers(0, 99))
def test_packing_is_the_little_endian_bit_stream_of_each_row(bits: int, rows: int, blocks: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, 32 * blocks))
    packed = np.array(pack(mx.array(codes), bits))
    assert packed.shape == (rows, blocks * bits)
    for row, stream in zip(codes, packed, strict=True):
        number = sum(int(code) << (bits * i) for i, code in enumerate(row))
        assert number.to_bytes(4 * blocks * bits, "little") == stream.tobytes()
    assert np.array_equal(np.array(unpack(mx.array(packed), bits, 32 * blocks)), codes)


def test_three_bits_take_exactly_three_bits() -> None:
    assert words(4096, 3) * 32 == 3 * 4096


@pytest.mark.parametrize(
    ("width", "block"), [(4096, 4096), (2880, 320), (576, 192), (5632, 512), (14336, 14336), (7, 1)]
)
def test_the_hadamard_block_is_the_largest_supported_divisor(width: int, block: int) -> None:
    assert hadamard_block(width) == block


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ShapeError, match="30 codes of 3 bits"):
        words(30, 3)
    with pytest.raises(ShapeError, match="groups of 64 do not divide a width of 96"):
        groups(96, 64)
    with pytest.raises(ShapeError, match="a codebook of 5 values"):
        bits_of((0.0, 1.0, 2.0, 3.0, 4.0))
    with pytest.raises(ShapeError, match="5 words hold no row of 64 codes"):
        unpack(mx.zeros((2, 5), dtype=mx.uint32), 3, 64)
    with pytest.raises(ShapeError, match="width of 0"):
        hadamard_block(0)
