"""Products with chosen experts: the reference is the definition, and shapes are checked."""

import mlx.core as mx
import pytest

import metal_kernels
from metal_kernels import AffineWeight, DenseWeight, Experts, PackedWeight, ShapeError, expert_matmul, quantize, rotate
from quant_engine.codebook import lloyd_max
from quant_engine.rotation import signs

EXPERTS, OUT, WIDTH = 6, 48, 96


@pytest.fixture(scope="module")
def matrices() -> list[mx.array]:
    mx.random.seed(3)
    return [mx.random.normal((OUT, WIDTH)) for _ in range(EXPERTS)]


def packed(matrices: list[mx.array], bits: int) -> list[PackedWeight]:
    turn = mx.array(signs(WIDTH, 0))
    codebook = lloyd_max(bits)
    return [PackedWeight(*quantize(rotate(w, turn, WIDTH), codebook, 32), codebook, turn, WIDTH) for w in matrices]


def choices(shape: tuple[int, ...]) -> mx.array:
    return mx.random.randint(0, EXPERTS, shape, key=mx.random.key(5))


SHAPES = [
    pytest.param((1, 1, WIDTH), (1, 2), id="one token"),
    pytest.param((2, 3, 1, 1, WIDTH), (2, 3, 4), id="a shared input"),
    pytest.param((2, 3, 4, 1, WIDTH), (2, 3, 4), id="an input for each expert"),
    pytest.param((40, 1, WIDTH), (40,), id="sorted rows"),
    pytest.param((5, 3, WIDTH), (5,), id="several rows at once"),
]


@pytest.mark.parametrize(("x_shape", "choice_shape"), SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_packed_experts_give_what_their_own_products_give(
    matrices: list[mx.array], bits: int, x_shape: tuple[int, ...], choice_shape: tuple[int, ...]
) -> None:
    weights, x, indices = packed(matrices, bits), mx.random.normal(x_shape), choices(choice_shape)
    y = expert_matmul(x, Experts(weights), indices)
    assert y.shape == (*choice_shape, x_shape[-2], OUT)
    spread = mx.broadcast_to(x, (*choice_shape, *x_shape[-2:])).reshape(-1, *x_shape[-2:])
    for row, expert, out in zip(spread, indices.reshape(-1).tolist(), y.reshape(-1, *y.shape[-2:]), strict=True):
        assert mx.allclose(out, metal_kernels.matmul(row, weights[expert]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("x_shape", "choice_shape"), SHAPES)
def test_every_backend_agrees_with_the_reference(
    matrices: list[mx.array], x_shape: tuple[int, ...], choice_shape: tuple[int, ...]
) -> None:
    x, indices = mx.random.normal(x_shape), choices(choice_shape)
    ours = expert_matmul(x, Experts(packed(matrices, 3)), indices)
    with metal_kernels.use_backend("reference"):
        theirs = expert_matmul(x, Experts(packed(matrices, 3)), indices)
    assert mx.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dense", "affine"])
def test_other_kinds_of_weights_give_what_mlx_gives(matrices: list[mx.array], kind: str) -> None:
    x, indices = mx.random.normal((7, 1, 1, WIDTH)), choices((7, 2))
    if kind == "dense":
        experts, stacked = Experts([DenseWeight(w) for w in matrices]), mx.stack(matrices)
    else:
        coded = [mx.quantize(w, group_size=32, bits=4) for w in matrices]
        experts = Experts([AffineWeight(*c, bits=4, group_size=32) for c in coded])
        stacked = mx.stack([mx.dequantize(*c, group_size=32, bits=4) for c in coded])
    expected = mx.gather_mm(x, stacked.swapaxes(-1, -2), rhs_indices=indices)
    assert mx.allclose(expert_matmul(x, experts, indices), expected, rtol=1e-4, atol=1e-4)


def test_what_ran_is_recorded(matrices: list[mx.array]) -> None:
    metal_kernels.reset_paths()
    expert_matmul(mx.ones((1, WIDTH)), Experts(packed(matrices, 3)), mx.array(2))
    assert "expert_matmul" in metal_kernels.kernel_path()


@pytest.mark.parametrize(
    ("x_shape", "choice_shape", "words"),
    [((1, WIDTH + 32), (), "last axis"), ((3, 1, WIDTH), (2,), "broadcast"), ((4, 3, 1, WIDTH), (3,), "broadcast")],
)
def test_shapes_that_do_not_fit_are_refused(
    matrices: list[mx.array], x_shape: tuple[int, ...], choice_shape: tuple[int, ...], words: str
) -> None:
    with pytest.raises(ShapeError, match=words):
        expert_matmul(mx.ones(x_shape), Experts([DenseWeight(w) for w in matrices]), choices(choice_shape))
