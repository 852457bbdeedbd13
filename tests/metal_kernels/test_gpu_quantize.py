"""The kernel of quantization, on this machine's GPU or an emulated one, against the reference."""

from pathlib import Path

import mlx.core as mx
import pytest

from metal_kernels import reference, unpack
from metal_kernels.gpu import quantize as gpu
from quant_engine.codebook import lloyd_max
from tests.metal_kernels.host.machine import on_machine

SHAPES = [(9, 32, 32), (3, 192, 64), (5, 128, 128), (1, 96, 32), (7, 224, 0), (1, 1056, 0)]


def rows_of(rows: int, width: int) -> mx.array:
    """Normal values, each row larger than the one before it."""
    x = mx.random.normal((rows, width), key=mx.random.key(width))
    return x * mx.power(2.0, mx.arange(rows))[:, None]


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_quantizing_gives_what_the_reference_gives(tmp_path: Path, bits: int, search: bool) -> None:
    codebook, inputs = lloyd_max(bits), [rows_of(rows, width) for rows, width, _ in SHAPES]
    cases = list(zip(inputs, [group for *_, group in SHAPES], strict=True))

    found = on_machine(tmp_path, lambda: [a for x, group in cases for a in gpu.quantize(x, codebook, group, search)])
    different = total = 0
    for i, (x, group) in enumerate(cases):
        packed, scales = reference.quantize(x, codebook, group, search)
        assert found[2 * i].shape == packed.shape and found[2 * i + 1].shape == scales.shape
        assert mx.allclose(found[2 * i + 1], scales, rtol=1e-3, atol=0), SHAPES[i]
        ours, right = (unpack(codes, bits, x.shape[1]).astype(mx.int32) for codes in (found[2 * i], packed))
        assert mx.abs(ours - right).max() <= 1
        different, total = different + (ours != right).sum().item(), total + x.size
    # A value between two codes may go to either.
    assert different <= 2e-3 * total


@pytest.mark.parametrize("bits", [1, 4])
def test_zeros_values_too_small_and_values_too_large_are_as_in_the_reference(tmp_path: Path, bits: int) -> None:
    codebook = lloyd_max(bits)
    normal = mx.random.normal((1, 64), key=mx.random.key(1))
    spike = mx.where(mx.arange(64) == 5, 1e4, 0.0)[None]
    x = mx.concatenate([mx.zeros((1, 64)), normal * 1e-9, normal * 1e7, spike, -spike])
    codes, scales = on_machine(tmp_path, lambda: list(gpu.quantize(x, codebook, 64, True)))
    expected = reference.quantize(x, codebook, 64)
    assert mx.array_equal(codes, expected[0])
    assert mx.array_equal(scales, expected[1])
    assert scales[2].item() == 65504


def test_the_kernel_takes_whole_words_of_few_bits() -> None:
    assert gpu.fits(lloyd_max(3), 96, 32) and gpu.fits(lloyd_max(1), 96, 0)
    assert not gpu.fits(lloyd_max(2), 48, 16) and not gpu.fits(lloyd_max(2), 48, 0)
    assert not gpu.fits(tuple(float(i) for i in range(256)), 64, 64)
