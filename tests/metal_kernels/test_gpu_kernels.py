"""The GPU kernels of products and rotations, on this machine's GPU or an emulated one, against the reference."""

from pathlib import Path

import mlx.core as mx
import pytest

from metal_kernels import quantize, reference
from metal_kernels.gpu import experts, hadamard, matmul, matvec, products, tiles, turned_product
from metal_kernels.gpu.fixed import TABLE_WORDS, fixed_words
from metal_kernels.gpu.products import Gpu
from metal_kernels.launch import Dialect, Kernel
from quant_engine.codebook import lloyd_max
from quant_engine.rotation import choose_block, signs
from tests.metal_kernels.host.machine import (
    EmulatorError,
    Launch,
    Machine,
    launched_by,
    needs_compiler,
    on_emulator,
    on_machine,
)

WEIGHTS = [(bits, group) for bits in (2, 3, 4) for group in (32, 64, 128, 0)]
ROWS, WIDTH = 40, 384
NO_TABLE = mx.zeros((TABLE_WORDS,), mx.uint32)
"""For what rotates and decodes nothing."""


def weights(bits: int, group: int) -> tuple[mx.array, mx.array]:
    """A packed matrix, made on the CPU: of two scales that are as good a GPU may find the other."""
    with mx.stream(mx.cpu):
        matrix = mx.random.normal((ROWS, WIDTH), key=mx.random.key(bits)) / WIDTH**0.5
        packed, scales = quantize(matrix, lloyd_max(bits), group)
    return packed, scales


def all_products(gpu: Dialect, dtype: mx.Dtype, rows: int) -> list[mx.array]:
    """Products of all kinds of weights with `rows` activations by the kernels."""
    x = mx.random.normal((rows, WIDTH), key=mx.random.key(9)).astype(dtype)
    made: list[mx.array] = []
    for bits, group in WEIGHTS:
        weight = tiles.arrange(*weights(bits, group), lloyd_max(bits), gpu)
        ready = hadamard.prepare(x, fixed_words(NO_TABLE, None, WIDTH), 1)
        made.append(matvec.matvec(ready, weight, dtype))
    return made


FEW = [
    ("metal", mx.float16, 1),
    ("metal", mx.float32, 3),
    ("cuda", mx.float16, 1),
    ("cuda", mx.float32, 1),
    ("cuda", mx.bfloat16, 3),
]


@pytest.mark.parametrize(("gpu", "dtype", "rows"), FEW, ids=str)
def test_products_equal_the_reference(tmp_path: Path, gpu: Gpu, dtype: mx.Dtype, rows: int) -> None:
    x = mx.random.normal((rows, WIDTH), key=mx.random.key(9)).astype(dtype).astype(mx.float32)
    found = on_machine(tmp_path, lambda: all_products(gpu, dtype, rows))
    bound = {mx.float16: 2e-3, mx.float32: 1e-3, mx.bfloat16: 8e-3}[dtype]
    for (bits, group), y in zip(WEIGHTS, found, strict=True):
        expected = reference.matmul(x, *weights(bits, group), lloyd_max(bits))
        assert y.shape == (rows, ROWS)
        assert mx.abs(y.astype(mx.float32) - expected).max() < bound * mx.abs(expected).max(), (bits, group)


@pytest.mark.parametrize("dtype", [mx.float16, mx.float32], ids=str)
@pytest.mark.parametrize("gpu", ["metal", "cuda"])
def test_products_of_many_rows_equal_the_reference(tmp_path: Path, gpu: Gpu, dtype: mx.Dtype) -> None:
    """By matrix units, whose rows and columns the emulated GPU spreads over lanes as Apple's and NVIDIA's do."""
    x = mx.random.normal((21, WIDTH), key=mx.random.key(9)).astype(dtype)
    cases = [(bits, group) for bits, group in WEIGHTS if group in (0, 32)]

    def run() -> list[mx.array]:
        ready = hadamard.prepare(x, fixed_words(NO_TABLE, None, WIDTH), 1)
        arranged = [tiles.arrange(*weights(*case), lloyd_max(case[0]), gpu) for case in cases]
        return [matmul.matmul(ready, weight, gpu, dtype, matmul.Shape(2, 2, 2, 1)) for weight in arranged]

    for (bits, group), y in zip(cases, on_machine(tmp_path, run), strict=True):
        expected = reference.matmul(x.astype(mx.float32), *weights(bits, group), lloyd_max(bits))
        assert mx.abs(y.astype(mx.float32) - expected).max() < 2e-3 * mx.abs(expected).max(), (bits, group)


ODD_SHAPES = [
    # rows, width, rows of activations, bits, group
    (81, 1120, 5, 3, 32),
    (1, 32, 1, 3, 32),
    (15, 96, 17, 2, 32),
    (17, 288, 3, 4, 0),
    (33, 544, 20, 3, 32),
    (47, 320, 9, 4, 64),
    (16, 640, 33, 2, 128),
]


@pytest.mark.parametrize(("gpu", "dtype"), [("metal", mx.float16), ("cuda", mx.bfloat16)], ids=str)
def test_odd_shapes_of_strided_activations_equal_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: Gpu, dtype: mx.Dtype
) -> None:
    """Those of few rows by two threadgroups, one with more tiles, and simdgroups that have blocks of several."""
    monkeypatch.setattr(matvec, "MULTIPROCESSORS", 2)
    monkeypatch.setattr(matvec, "SIMDGROUPS", {2: 1, 3: 2, 4: 3})
    made = [(case, *odd_case(*case, dtype, gpu)) for case in ODD_SHAPES]

    def run() -> list[mx.array]:
        return [products.multiply(x, weight, gpu) for _, x, weight, _ in made]

    for (case, _, _, right), y in zip(made, on_machine(tmp_path, run), strict=True):
        off = mx.abs(y.astype(mx.float32) - right).max() / mx.abs(right).max()
        assert y.shape == right.shape
        assert off < (2e-3 if dtype == mx.float16 else 8e-3), case


def odd_case(
    rows: int, width: int, n: int, bits: int, group: int, dtype: mx.Dtype, gpu: Gpu
) -> tuple[mx.array, tiles.TileWeight, mx.array]:
    """Activations, every second column of an array; a weight; and their product by the reference."""
    block, turn = choose_block(width, "auto"), mx.array(signs(width, bits))
    x = mx.random.normal((n, width, 2), key=mx.random.key(rows)).astype(dtype)[:, :, 1]
    codes = quantize(mx.random.normal((rows, width), key=mx.random.key(width)), lloyd_max(bits), group)
    rotated = reference.rotate(x.astype(mx.float32), turn, block)
    weight = tiles.arrange(*codes, lloyd_max(bits), gpu, turn, block)
    return x, weight, reference.matmul(rotated, *codes, lloyd_max(bits))


EXPERTS = 5
CHOICES = {
    "a shared input": ((2, 1, 1), [[3, 0, 1], [4, 3, 2]]),
    "an input for each expert": ((2, 3, 1), [[3, 0, 1], [4, 3, 2]]),
    "several rows at once": ((3, 2), [0, 4, 0]),
    "rows in order": ((21, 1), [0] * 12 + [2] * 8 + [4]),
}


@pytest.mark.parametrize("most_work", [0, 10**6], ids=["two launches", "one launch"])
@pytest.mark.parametrize("gpu", ["metal", "cuda"])
def test_products_with_experts_equal_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: Gpu, most_work: int
) -> None:
    monkeypatch.setitem(turned_product.MOST_WORK, gpu, most_work)
    monkeypatch.setattr(turned_product, "RESIDENT", 32)
    monkeypatch.setattr(matvec, "MULTIPROCESSORS", 1)
    monkeypatch.setattr(experts, "MATRIX_ROWS", 1)
    monkeypatch.setitem(matmul.SHAPES, gpu, matmul.Shape(2, 2, 2, 1))
    turn = mx.array(signs(WIDTH, 3))
    each = [quantize(mx.random.normal((ROWS, WIDTH), key=mx.random.key(e)), lloyd_max(3), 64) for e in range(EXPERTS)]
    weight = experts.stack([tiles.arrange(*codes, lloyd_max(3), gpu, turn, WIDTH) for codes in each])
    values = [reference.dequantize(*codes, lloyd_max(3)) for codes in each]
    inputs = {name: mx.random.normal((*shape, WIDTH), key=mx.random.key(7)) for name, (shape, _) in CHOICES.items()}

    def run() -> list[mx.array]:
        return [
            experts.expert_product(inputs[name], weight, mx.array(chosen), "order" in name, gpu)
            for name, (_, chosen) in CHOICES.items()
        ]

    for (name, (_, chosen)), y in zip(CHOICES.items(), on_machine(tmp_path, run), strict=True):
        expected = reference.expert_matmul(reference.rotate(inputs[name], turn, WIDTH), values, mx.array(chosen))
        assert y.shape == expected.shape, name
        assert mx.abs(y - expected).max() < 1e-3 * mx.abs(expected).max(), name


@pytest.mark.parametrize(
    ("n", "width"), [(3, 64), (3, 288), (3, 320), (3, 1536), (3, 2048), (1, 5120), (1, 8192), (17, 1536)]
)
def test_rotations_equal_the_reference(tmp_path: Path, n: int, width: int) -> None:
    """Blocks with an odd factor are shared out where they are few."""
    turn, block = mx.array(signs(width, 3)), choose_block(width, "auto")
    x = mx.random.normal((n, width), key=mx.random.key(1))
    (y,) = on_machine(tmp_path, lambda: [hadamard.rotate(x, fixed_words(NO_TABLE, turn, width), block)])
    assert mx.allclose(y, reference.rotate(x, turn, block), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_gated_activations_are_rotated_as_the_activation_and_the_rotation_would(
    tmp_path: Path, dtype: mx.Dtype
) -> None:
    turn, block = mx.array(signs(WIDTH, 3)), choose_block(WIDTH, "auto")
    both = (3 * mx.random.normal((2, 2 * WIDTH), key=mx.random.key(1))).astype(dtype)

    def run() -> list[mx.array]:
        return [hadamard.prepare(both, fixed_words(NO_TABLE, turn, WIDTH), block, gated=True).halves]

    (halves,) = on_machine(tmp_path, run)
    gate, up = both.split(2, axis=-1)
    expected = reference.rotate((gate * mx.sigmoid(gate) * up).astype(mx.float32), turn, block)
    padded, exponents = WIDTH + -WIDTH % tiles.BLOCK_COLUMNS, halves.reshape(-1)[-2:].astype(mx.float32)
    factors = 1.0 if dtype == mx.float16 else 2 ** (exponents - 127)[:, None]
    runs = halves.reshape(-1)[: 2 * padded].reshape(-1, 2, 32).swapaxes(0, 1)
    found = runs.reshape(2, padded)[:, :WIDTH].astype(mx.float32) * factors
    assert mx.abs(found - expected).max() < 2e-2 * mx.abs(expected).max()


@pytest.mark.parametrize("gpu", ["metal", "cuda"])
@pytest.mark.parametrize(("bits", "group"), WEIGHTS)
def test_the_layout_of_tiles_can_be_undone(bits: int, group: int, gpu: Gpu) -> None:
    packed, scales = weights(bits, group)
    restored = tiles.restore(tiles.arrange(packed, scales, lloyd_max(bits), gpu))
    assert mx.array_equal(restored[0], packed)
    assert mx.array_equal(restored[1], scales)


@pytest.mark.parametrize("gpu", ["metal", "cuda"])
@pytest.mark.parametrize(("bits", "group"), WEIGHTS)
def test_single_rows_of_tiles_can_be_taken(bits: int, group: int, gpu: Gpu) -> None:
    packed, scales = weights(bits, group)
    rows = mx.array([39, 0, 8, 17, 8], dtype=mx.uint32)
    taken = tiles.arrange(packed, scales, lloyd_max(bits), gpu).take(rows)
    assert mx.array_equal(taken[0], packed[rows])
    assert mx.array_equal(taken[1], scales[rows])


def one_product(gpu: Dialect) -> list[mx.array]:
    """A rotated product, short enough to be compiled again for every fault."""
    turn, block = mx.array(signs(WIDTH, 3)), choose_block(WIDTH, "auto")
    x = mx.random.normal((2, WIDTH), key=mx.random.key(9)).astype(mx.float16)
    weight = tiles.arrange(*weights(3, 64), lloyd_max(3), gpu)
    ready = hadamard.prepare(x, fixed_words(NO_TABLE, turn, WIDTH), block)
    return [matvec.matvec(ready, weight, mx.float16)]


def faulty_kernel(name: str, folder: Path, edit: tuple[str, str], gpu: Dialect) -> list[mx.array]:
    """`one_product` with an edit in the source of one of its kernels."""
    needs_compiler()
    sound, broken = Machine(folder / "sound"), Machine(folder / "broken", (edit,))
    for machine in (sound, broken):
        machine.folder.mkdir()

    def launch(kernel: Kernel, call: Launch) -> list[mx.array]:
        return (broken if kernel.name == name else sound).launch(kernel, call)

    with launched_by(launch):
        sound.noting = broken.noting = True
        one_product(gpu)
        sound.noting = broken.noting = False
        return one_product(gpu)


MATVEC, ROTATE = "turboquant_matvec_alone", "turboquant_rotate"
FAULTS = {
    "a dropped barrier": (MATVEC, "barrier();\nuint outputs", "uint outputs"),
    "a wrong shuffle distance": (
        ROTATE,
        "other = shuffle_xor(value, distance)",
        "other = shuffle_xor(value, distance ^ 3)",
    ),
    "an output one off": (MATVEC, "out[output * rows + row] =", "out[output * rows + row + 1] ="),
    "an input one off": (MATVEC, "x(all + 8 * (lane % 4))", "x(all + 8 * (lane % 4) + 1)"),
    "a wrong stride": (MATVEC, "partial[piece * PIECE + row", "partial[piece * PIECE + row / 2"),
    "a wrong lane looked up": (MATVEC, "at(upper_bits(two))", "at(upper_bits(two) ^ 1)"),
    "a look-up that some lanes skip": (MATVEC, "uint first = values_of", "uint first = two % 16 == 0 ? 0 : values_of"),
}
NVIDIA_FAULTS = {
    "a table read before it is there": (MATVEC, "if (NVIDIA) {\nbarrier();\n}\n", ""),
    "a wrong byte looked up": (MATVEC, "0x5504u | (byte << 4)", "0x5504u | (byte / 2 << 4)"),
    "a table's row of another byte": (MATVEC, "(byte * ROW +", "((byte ^ 1) * ROW +"),
}


@pytest.mark.parametrize("fault", [*FAULTS, *NVIDIA_FAULTS])
def test_a_seeded_fault_shows(tmp_path: Path, fault: str) -> None:
    gpu: Dialect = "cuda" if fault in NVIDIA_FAULTS else "host"
    kernel, right, wrong = (FAULTS | NVIDIA_FAULTS)[fault]
    (sound,) = on_emulator(tmp_path, lambda: one_product(gpu))
    try:
        (found,) = faulty_kernel(kernel, tmp_path, (right, wrong), gpu)
    except EmulatorError:
        return
    assert not mx.array_equal(found, sound)
