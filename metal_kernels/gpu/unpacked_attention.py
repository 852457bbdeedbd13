"""Attention of many rows of queries over packed tokens: some heads at a time are unpacked for MLX's own attention."""

import mlx.core as mx

from metal_kernels.gpu.attention import Kind, unpack
from metal_kernels.gpu.products import Gpu

MANY_ROWS = 64
"""Rows of queries of a head of keys from which unpacking can pay."""
MUCH_WORK = 8_000_000
"""Rows times tokens, of all heads of keys, from which it does: launches take less time then."""
TILE_BYTES = 256 << 20
"""Of unpacked keys and values at a time, unless one head has more."""
SIZES: dict[Gpu, range | tuple[int, ...]] = {"metal": (64, 72, 80, 96, 128), "cuda": range(8, 129, 8)}
"""Sizes of heads that MLX's fused attention takes; others would expand all scores."""


def pays(queries: mx.array, kind: Kind, kv_heads: int, length: int) -> bool:
    """Whether these rows (B, H, L, size) are enough, and MLX's attention takes heads like these."""
    batch, heads, count, size = queries.shape
    rows = heads // kv_heads * count
    fits = (
        queries.dtype in (mx.float16, mx.bfloat16)
        and size in SIZES[kind.gpu]
        and (kind.values.size == size or (kind.gpu == "cuda" and kind.values.size in SIZES["cuda"]))
        and count <= length
    )
    return fits and rows >= MANY_ROWS and batch * kv_heads * rows * length >= MUCH_WORK


def attend(
    queries: mx.array,
    keys: tuple[mx.array, mx.array],
    values: tuple[mx.array, mx.array],
    kind: Kind,
    *,
    length: int,
    bias: mx.array | None,
    sinks: mx.array | None,
) -> mx.array:
    """As `gpu.attention.attend`, of rotated queries, in the rotated domain."""
    batch, heads = queries.shape[:2]
    kv_heads = keys[0].shape[1]
    each, parts = heads // kv_heads, list[mx.array]()
    mask = "causal" if kind.causal else None if bias is None else _finite(bias, queries.dtype)
    for some in _tiles(kv_heads, 2 * batch * length * (kind.keys.size + kind.values.size)):
        rows = slice(some.start * each, some.stop * each)
        k, v = (
            unpack(tokens, code, some, length, queries.dtype, kind.gpu)
            for tokens, code in ((keys, kind.keys), (values, kind.values))
        )
        seen = mask[:, rows] if isinstance(mask, mx.array) and mask.shape[1] > 1 else mask
        own = None if sinks is None else sinks[rows].astype(queries.dtype)
        parts.append(mx.fast.scaled_dot_product_attention(
            queries[:, rows], k, v, scale=kind.scale, mask=seen, sinks=own
        ))  # fmt: skip
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)


def _tiles(heads: int, head_bytes: int) -> list[range]:
    """Heads of keys, as many at a time as TILE_BYTES has room for, and as evenly."""
    count = -(-heads // max(1, TILE_BYTES // head_bytes))
    return [range(heads * i // count, heads * (i + 1) // count) for i in range(count)]


def _finite(bias: mx.array, dtype: mx.Dtype) -> mx.array:
    """An additive mask with which a row that sees nothing has numbers still."""
    return mx.maximum(bias, mx.finfo(dtype).min).astype(dtype)
