import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import ShapeError, hadamard_block, reference, rotate, unrotate, use_backend

WIDTHS = [32, 64, 80, 96, 256, 448, 512, 640, 704, 1536, 2880]


def _signs(width: int) -> mx.array:
    return mx.array(np.random.default_rng(width).choice([-1.0, 1.0], width).astype(np.float32))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [1, 3])
def test_rotation_keeps_lengths_and_is_undone(backend: str, width: int, rows: int) -> None:
    x = mx.random.normal((rows, width), key=mx.random.key(width))
    signs, block = _signs(width), hadamard_block(width)
    with use_backend(backend):
        turned = rotate(x, signs, block)
        back = unrotate(turned, signs, block)
    assert mx.allclose(mx.linalg.norm(turned, axis=-1), mx.linalg.norm(x, axis=-1), rtol=1e-5)
    assert mx.allclose(back, x, atol=1e-5)
    assert not mx.allclose(turned, x, atol=0.1)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_cpu_kernel_equals_the_reference(width: int) -> None:
    x, signs, block = mx.random.normal((5, width), key=mx.random.key(1)), _signs(width), hadamard_block(width)
    with use_backend("reference"):
        expected = rotate(x, signs, block)
    assert mx.allclose(rotate(x, signs, block), expected, atol=1e-5)


def test_powers_of_two_are_sylvesters_matrix() -> None:
    sylvester = np.ones((1, 1))
    for _ in range(7):
        sylvester = np.kron(sylvester, [[1, 1], [1, -1]])
    assert np.allclose(np.array(rotate(mx.eye(128), None, 128)), sylvester / np.sqrt(128), atol=1e-6)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_the_result_has_the_activations_dtype(dtype: mx.Dtype) -> None:
    assert rotate(mx.ones((2, 64), dtype=dtype), _signs(64), 64).dtype == dtype


def test_a_block_that_does_not_fit_is_named() -> None:
    with pytest.raises(ShapeError, match="block of 48 for a width of 64; the largest that fits is 64"):
        rotate(mx.ones((2, 64)), None, 48)
    with pytest.raises(ShapeError, match="signs of shape"):
        rotate(mx.ones((2, 64)), mx.ones(32), 64)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("block", [12, 20, 28, 112, 320])
def test_the_reference_turns_back_with_every_odd_factor(block: int, dtype: mx.Dtype) -> None:
    x = mx.random.normal((64, 2 * block), key=mx.random.key(block))
    back = reference.unrotate(reference.rotate(x.astype(dtype), None, block), None, block).astype(mx.float32)
    assert mx.abs(back - x).max() < 3 * mx.finfo(dtype).eps * mx.abs(x).max()
