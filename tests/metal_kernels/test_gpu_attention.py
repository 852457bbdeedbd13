"""The kernels of attention and packing, on this machine's GPU or an emulated one, against the reference."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from metal_kernels import CacheCode, pack_cache, packed_attention, reference, rotate, unrotate, use_backend
from metal_kernels.gpu import attention as gpu
from metal_kernels.gpu import unpacked_attention
from metal_kernels.gpu.products import Gpu
from quant_engine.kv_cache import cache_code
from tests.metal_kernels.host.machine import on_machine

CODES = [(8, 128, 0), (4, 64, 64), (3, 128, 64), (2, 96, 32), (2, 80, 0), (4, 192, 64), (2, 256, 128)]


def head_code(code: CacheCode) -> gpu.HeadCode:
    return gpu.HeadCode.of(code.codebook, code.group_size or code.size, code.signs, code.block, code.size)


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_packing_gives_what_the_reference_gives(tmp_path: Path, dtype: mx.Dtype) -> None:
    codes = [cache_code(size, bits, group, 1) for bits, size, group in CODES]
    inputs = [normal(1, 2, 3, code.size).astype(dtype) for code in codes]
    found = on_machine(
        tmp_path, lambda: [a for x, c in zip(inputs, codes, strict=True) for a in gpu.pack(x, head_code(c))]
    )
    for i, (x, code) in enumerate(zip(inputs, codes, strict=True)):
        with use_backend("reference"):
            packed, scales = pack_cache(x, code)
        assert mx.allclose(found[2 * i + 1], scales, rtol=2e-3, atol=0), CODES[i]
        ours = reference.dequantize(found[2 * i], found[2 * i + 1], code.codebook)
        theirs = reference.dequantize(packed, scales, code.codebook)
        # A value between two codes may go to either.
        assert (mx.abs(ours - theirs) > 0.01).mean() < 5e-3, CODES[i]


CASES = {
    "one query": (1, 8, 2, 1, 150, "none"),
    "queries in order": (1, 4, 2, 5, 70, "causal"),
    "left padding": (2, 2, 1, 1, 40, "padding"),
    "a bias for each head": (1, 4, 2, 2, 33, "bias"),
    "sinks": (2, 6, 2, 2, 20, "sinks"),
}
PAIRS = [
    ((8, 128, 64), (4, 128, 64)),
    ((3, 64, 64), (3, 64, 64)),
    ((3, 192, 64), (2, 128, 32)),
    ((4, 80, 0), (4, 80, 0)),
    ((4, 128, 64), (3, 128, 64)),
]


@pytest.mark.parametrize(
    ("machine", "pair"), [*(("cuda", pair) for pair in PAIRS), *(("metal", pair) for pair in PAIRS[::2])], ids=str
)
def test_attention_gives_what_the_reference_gives(
    tmp_path: Path,
    machine: Gpu,
    pair: tuple[tuple[int, int, int], tuple[int, int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu, "THREADGROUPS", {"cuda": 6, "metal": 6})
    of_keys, of_values = (cache_code(size, bits, group, 1) for bits, size, group in pair)
    prepared = {name: _case(case, of_keys, of_values) for name, case in CASES.items()}

    _compare(tmp_path, machine, of_keys, of_values, prepared)


@pytest.mark.parametrize("machine", ["cuda", "metal"])
def test_arrays_of_a_few_values_lie_where_others_do(tmp_path: Path, machine: Gpu) -> None:
    """A cache with room for one token, and masks of four values and of one."""
    code = cache_code(64, 2, 64, 1)
    q, k, v, how, options = _case((1, 1, 1, 1, 1, "none"), code, code)
    k, v = ((codes[:, :, :1], scales[:, :, :1]) for codes, scales in (k, v))
    prepared: dict[str, Any] = {"one token": (q, k, v, how, options | {"bias": mx.full((1, 1, 1, 1), 0.5)})}
    for name, rows, length, bias in (
        ("four values", 2, 2, mx.array([[0.0, -mx.inf], [0.3, 0.1]])),
        ("one", 1, 5, mx.array([[0.5]])),
    ):
        q, k, v, how, options = _case((1, 4, 2, rows, length, "none"), code, code)
        prepared[name] = q, k, v, how, options | {"bias": bias[None, None]}
    _compare(tmp_path, machine, code, code, prepared)


MANY = {
    "all seen": (1, 2, 1, 32, 131, "none"),
    "queries in order": (1, 9, 3, 40, 140, "causal"),
    "no token before them": (1, 1, 1, 70, 70, "causal"),
    "left padding": (2, 2, 1, 35, 40, "padding"),
    "a bias for each head": (1, 4, 2, 32, 66, "bias"),
    "sinks": (1, 6, 2, 33, 50, "sinks"),
}
MANY_PAIRS = [("cuda", PAIRS[0]), ("cuda", PAIRS[1]), ("metal", ((3, 96, 32), (2, 96, 0)))]


@pytest.mark.parametrize(("machine", "pair"), MANY_PAIRS, ids=str)
def test_attention_of_many_rows_gives_what_the_reference_gives(
    tmp_path: Path,
    machine: Gpu,
    pair: tuple[tuple[int, int, int], tuple[int, int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By MLX's attention, over the tokens of some heads at a time."""
    of_keys, of_values = (cache_code(size, bits, group, 1) for bits, size, group in pair)
    monkeypatch.setattr(unpacked_attention, "TILE_BYTES", 4 * 140 * (of_keys.size + of_values.size))
    prepared = {name: _case(case, of_keys, of_values) for name, case in MANY.items()}

    def attend(q: mx.array, *tokens: Any, **options: Any) -> mx.array:
        rotated = rotate(q, of_keys.signs, of_keys.block)
        return unrotate(unpacked_attention.attend(rotated, *tokens, **options), of_values.signs, of_values.block)

    _compare(tmp_path, machine, of_keys, of_values, prepared, attend)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("machine", ["cuda", "metal"])
def test_unpacking_gives_what_was_packed(tmp_path: Path, machine: Gpu, dtype: mx.Dtype) -> None:
    codes = [cache_code(size, bits, group, 1) for bits, size, group in CODES]
    with use_backend("reference"):
        held = [pack_cache(normal(2, 3, 9, code.size), code) for code in codes]

    def run() -> list[mx.array]:
        return [
            gpu.unpack(tokens, head_code(code), range(1, 3), 7, dtype, machine)
            for tokens, code in zip(held, codes, strict=True)
        ]

    for tokens, code, found in zip(held, codes, on_machine(tmp_path, run), strict=True):
        expected = reference.dequantize(*tokens, code.codebook)[:, 1:, :7]
        assert (found.dtype, found.shape) == (dtype, expected.shape)
        assert mx.abs(found - expected).max() < 2 * mx.finfo(dtype).eps * mx.abs(expected).max(), code


def test_unpacking_pays_where_there_is_much_to_do_and_heads_fit() -> None:
    of_keys, of_values = (head_code(cache_code(128, bits, 64, 1)) for bits in (3, 4))
    kind, q = gpu.Kind(of_keys, of_values, 1.0, True, "cuda"), mx.zeros((1, 32, 2048, 128), mx.float16)
    assert unpacked_attention.pays(q, kind, 8, 2048)
    assert not unpacked_attention.pays(q[:, :, :8], kind, 8, 1 << 20)
    assert not unpacked_attention.pays(q[:, :, :64], kind, 8, 2048)
    assert not unpacked_attention.pays(q.astype(mx.float32), kind, 8, 2048)
    wide = head_code(cache_code(256, 4, 64, 1))
    assert not unpacked_attention.pays(
        mx.zeros((1, 32, 2048, 256), mx.float16), gpu.Kind(wide, wide, 1.0, True, "metal"), 8, 2048
    )


def _compare(
    folder: Path,
    machine: Gpu,
    of_keys: CacheCode,
    of_values: CacheCode,
    prepared: dict[str, Any],
    attend: Callable[..., mx.array] = gpu.attend,
) -> None:
    def run() -> list[mx.array]:
        return [
            attend(q, k, v, gpu.Kind(head_code(of_keys), head_code(of_values), *how, machine), **options)
            for q, k, v, how, options in prepared.values()
        ]

    for (name, (q, k, v, (scale, causal), options)), y in zip(prepared.items(), on_machine(folder, run), strict=True):
        mask = "causal" if causal else options["bias"]
        with use_backend("reference"):
            expected = packed_attention(
                q, k, v, of_keys, of_values, length=options["length"], scale=scale, mask=mask,
                sinks=options["sinks"],
            )  # fmt: skip
        assert y.shape == expected.shape
        assert mx.abs(y - expected).max() < 2e-3 * mx.abs(expected).max(), name


def _case(case: tuple[int, int, int, int, int, str], of_keys: CacheCode, of_values: CacheCode):
    batch, heads, kv_heads, rows, length, kind = case
    with use_backend("reference"):
        k, v = (
            pack_cache(normal(batch, kv_heads, length + 90, c.size, seed=i), c)
            for i, c in enumerate((of_keys, of_values))
        )
    bias = None
    if kind == "padding":
        bias = mx.where(mx.arange(length) >= mx.array([[13], [0]])[:, None, None], 0.0, -mx.inf)
    if kind == "bias":
        bias = normal(1, heads, rows, length, seed=4)
    options = {"length": length, "bias": bias, "sinks": normal(heads, seed=5) if kind == "sinks" else None}
    how = of_keys.size**-0.5, kind == "causal"
    return normal(batch, heads, rows, of_keys.size, seed=3), k, v, how, options
