import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metal_kernels import (
    CacheCode,
    ShapeError,
    attention,
    hadamard_block,
    pack_cache,
    packed_attention,
    unpack_cache,
    use_backend,
)
from tests.metal_kernels.test_quantize import CODEBOOKS

CODEBOOKS = {**CODEBOOKS, 8: tuple((2 * i - 255) / 255 for i in range(256))}
MASKS = ["none", "causal", "bool", "additive"]
SHAPES = [(1, 700), (4, 300), (40, 40), (33, 1100)]


def _code(bits: int, size: int, group_size: int, seed: int = 0) -> CacheCode:
    signs = mx.array(np.random.default_rng(seed).choice([-1.0, 1.0], size).astype(np.float32))
    return CacheCode(CODEBOOKS[bits], group_size, signs, hadamard_block(size), size)


def _normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def _mask(kind: str, batch: int, rows: int, length: int) -> mx.array | str | None:
    if kind == "bool":
        return (mx.random.uniform(shape=(batch, 1, rows, length), key=mx.random.key(5)) > 0.3) | (
            mx.arange(length) == 0
        )
    if kind == "additive":
        return mx.where(mx.arange(length) >= mx.array([[5], [0]])[:, None, None], 0.0, -1e9) * mx.ones((1, 1, rows, 1))
    return kind if kind == "causal" else None


def _exact(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None,
    dtype: type = np.float64,
) -> np.ndarray:
    """Attention by its definition, in `dtype`."""
    queries, keys, values = (np.array(a.astype(mx.float32)).astype(dtype) for a in (q, k, v))
    shared = queries.shape[1] // keys.shape[1]
    keys, values = keys.repeat(shared, 1), values.repeat(shared, 1)
    scores = (queries @ keys.swapaxes(-1, -2)) * dtype(scale)
    rows, length = scores.shape[-2:]
    if isinstance(mask, str):
        scores = np.where(np.tril(np.ones((rows, length), bool), length - rows), scores, -np.inf)
    elif mask is not None:
        given_mask = np.array(mask)
        scores = np.where(given_mask, scores, -np.inf) if given_mask.dtype == bool else scores + given_mask
    extra = [] if sinks is None else [np.broadcast_to(np.array(sinks)[:, None, None], (*scores.shape[:-1], 1))]
    joined = np.concatenate([scores, *extra], axis=-1)
    weights = np.exp(joined - joined.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return weights[..., :length].astype(dtype) @ values


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("rows", "length"), SHAPES)
def test_attention_on_floats_equals_its_definition(backend: str, kind: str, rows: int, length: int) -> None:
    q, k, v = _normal(2, 4, rows, 64), _normal(2, 2, length, 64, seed=1), _normal(2, 2, length, 64, seed=2)
    mask = _mask(kind, 2, rows, length)
    with use_backend(backend):
        out = attention(q, k, v, scale=0.125, mask=mask)
    exact = _exact(q, k, v, 0.125, mask, None)
    half = np.abs(_exact(q, k, v, 0.125, mask, None, np.float16) - exact).max()
    assert np.abs(np.array(out) - exact).max() < 0.1 * half


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("rows", "length"), SHAPES)
@pytest.mark.parametrize(("k_bits", "v_bits"), [(8, 4), (3, 2)])
def test_attention_on_packed_tokens_equals_that_on_what_they_stand_for(
    backend: str, kind: str, rows: int, length: int, k_bits: int, v_bits: int
) -> None:
    q, k, v = _normal(2, 4, rows, 64), _normal(2, 2, length, 64, seed=1), _normal(2, 2, length, 64, seed=2)
    mask, codes = _mask(kind, 2, rows, length), (_code(k_bits, 64, 64), _code(v_bits, 64, 32, seed=1))
    keys, values = pack_cache(k, codes[0]), pack_cache(v, codes[1])
    sinks = _normal(4, seed=3)
    with use_backend(backend):
        out = packed_attention(q, keys, values, *codes, length=length, scale=0.125, mask=mask, sinks=sinks)
    held = unpack_cache(*keys, codes[0], mx.float32), unpack_cache(*values, codes[1], mx.float32)
    exact = _exact(q, *held, 0.125, mask, sinks)
    half = np.abs(_exact(q, *held, 0.125, mask, sinks, np.float16) - exact).max()
    assert np.abs(np.array(out) - exact).max() < 0.1 * half


@settings(deadline=None, max_examples=25)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    size=st.sampled_from([32, 64, 96, 128, 192]),
    heads=st.sampled_from([1, 3]),
    shared=st.sampled_from([1, 2, 5]),
    rows=st.integers(1, 20),
    more=st.integers(0, 600),
)
def test_any_head_size_grouping_and_length(bits: int, size: int, heads: int, shared: int, rows: int, more: int) -> None:
    length, code = rows + more, _code(bits, size, 32)
    q, k, v = (
        _normal(1, heads * shared, rows, size),
        _normal(1, heads, length, size, seed=1),
        _normal(1, heads, length, size, seed=2),
    )
    keys, values = pack_cache(k, code), pack_cache(v, code)
    out = packed_attention(q, keys, values, code, code, length=length, scale=size**-0.5, mask="causal")
    held = unpack_cache(*keys, code, mx.float32), unpack_cache(*values, code, mx.float32)
    assert np.allclose(np.array(out), _exact(q, *held, size**-0.5, "causal", None), atol=1e-4)


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [8, 24, 40, 56, 104])
def test_heads_that_sixteen_does_not_divide(size: int, bits: int, rows: int) -> None:
    q, k, v = _normal(1, 4, rows, size, seed=1), _normal(1, 2, 50, size, seed=2), _normal(1, 2, 50, size, seed=3)
    if size * bits % 32:
        with pytest.raises(ShapeError):
            _code(bits, size, 0)
        return
    code = _code(bits, size, 0)
    with use_backend("cpu"):
        held = pack_cache(k, code), pack_cache(v, code)
        found = packed_attention(q, *held, code, code, length=50, scale=0.2, mask="causal")
    keys, values = (unpack_cache(*side, code, mx.float32) for side in held)
    expected = _exact(q, keys, values, 0.2, "causal", None)
    assert np.abs(np.array(found) - expected).max() < 1e-4


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_room_beyond_the_tokens_is_never_read(backend: str, rows: int) -> None:
    code = _code(3, 64, 64)
    q, k = _normal(1, 2, rows, 64), _normal(1, 2, 77, 64, seed=1)
    codes, scales = pack_cache(k, code)
    poisoned = (
        mx.concatenate([codes, mx.full((1, 2, 50, 6), 0xFFFFFFFF, dtype=mx.uint32)], axis=2),
        mx.concatenate([scales, mx.full((1, 2, 50, 1), mx.nan, dtype=mx.float16)], axis=2),
    )
    with use_backend(backend):
        clean = packed_attention(q, (codes, scales), (codes, scales), code, code, length=77, scale=0.1)
        out = packed_attention(q, poisoned, poisoned, code, code, length=77, scale=0.1)
    assert mx.array_equal(out, clean)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("rows", [5, 9])
def test_strided_keys_and_queries_are_read_right(rows: int, heads: int) -> None:
    q, k = _normal(1, rows, 4, 64).swapaxes(1, 2), _normal(1, 300, heads, 64, seed=1).swapaxes(1, 2)
    v = _normal(1, heads, 400, 64, seed=2)[:, :, 50:350]
    assert np.allclose(np.array(attention(q, k, v, scale=0.1)), _exact(q, k, v, 0.1, None, None), atol=1e-5)


def test_rows_that_see_nothing_give_zeros() -> None:
    q, k = _normal(1, 2, 3, 64), _normal(1, 2, 10, 64, seed=1)
    mask = mx.broadcast_to((mx.arange(3) > 0)[:, None], (3, 10))
    out = attention(q, k, k, scale=0.1, mask=mask)
    assert mx.array_equal(out[:, :, 0], mx.zeros((1, 2, 64)))
    assert mx.isfinite(out).all()


@pytest.mark.parametrize(("bits", "error"), [(2, 0.1111), (3, 0.0312), (4, 0.0083), (8, 3.5e-5)])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_packing_loses_what_the_code_does_on_gaussian_keys(backend: str, bits: int, error: float) -> None:
    x, code = _normal(1, 4, 2000, 64), _code(bits, 64, 64)
    with use_backend(backend):
        codes, scales = pack_cache(x, code)
    assert codes.shape == (1, 4, 2000, 2 * bits)
    assert scales.shape == (1, 4, 2000, 1)
    lost = mx.square(unpack_cache(codes, scales, code, mx.float32) - x).mean() / mx.square(x).mean()
    assert lost.item() == pytest.approx(error, rel=0.05)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_no_number_stays_none(packed: bool, rows: int) -> None:
    """Damaged weights must show."""
    q, k, v = _normal(1, 4, rows, 64, seed=1), _normal(1, 2, 600, 64, seed=2), _normal(1, 2, 600, 64, seed=3)
    with use_backend("cpu"):
        if packed:
            q[0, 2, rows - 1, 5] = float("nan")
            code = _code(4, 64, 64)
            held = pack_cache(k, code), pack_cache(v, code)
            found = packed_attention(q, *held, code, code, length=600, scale=0.2, mask="causal")
        else:
            k[0, 1, 300, 5] = float("nan")
            found = attention(q, k, v, scale=0.2)
    damaged = np.isnan(np.array(found)).any(-1)[0]
    assert damaged[2 if packed else slice(2, 4), rows - 1].all()
    assert not damaged[:2].any()


def test_half_precision_queries_get_half_precision_back() -> None:
    q = _normal(1, 2, 1, 64).astype(mx.bfloat16)
    assert attention(q, q, q, scale=1.0).dtype == mx.bfloat16


def test_what_does_not_fit_is_named() -> None:
    q = _normal(1, 3, 1, 64)
    with pytest.raises(ShapeError, match="for 2 key-value heads of 64"):
        attention(q, _normal(1, 2, 5, 64), _normal(1, 2, 5, 64), scale=1.0)
    with pytest.raises(ShapeError, match="groups of 64 do not divide a width of 96"):
        _code(3, 96, 64)
    with pytest.raises(ShapeError, match="a codebook of 256 values in uneven steps"):
        CacheCode(tuple(float(i * i) for i in range(256)), 64, None, 1, 64)
    with pytest.raises(ShapeError, match="heads of 32 values for a code of 64"):
        pack_cache(_normal(1, 1, 1, 32), _code(3, 64, 64))
    with pytest.raises(ShapeError, match="mask 'diagonal'"):
        attention(q, q, q, scale=1.0, mask="diagonal")
    with pytest.raises(ShapeError, match="over 1 tokens"):
        attention(q, q, q, scale=1.0, mask=mx.ones((1, 7)))
