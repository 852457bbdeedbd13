"""Attention over packed keys and values, and the packing of new ones, on a GPU."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import mlx.core as mx
import numpy as np

from metal_kernels.gpu.fixed import factors, fixed_words
from metal_kernels.gpu.products import Gpu
from metal_kernels.gpu.tiles import BITS, PAIR_TABLE, symmetric, table_words
from metal_kernels.launch import FEW_VALUES, SIMD, Kernel, constant, float_bits, made, number, table
from metal_kernels.layout import bits_of

FEW, FEW_QUERIES = 4096, 8
"""Heads of keys, and queries of a row, up to which a launch takes more time than its arithmetic."""
JOINING = 16
"""Simdgroups of a threadgroup that joins the parts of a context."""
TOKENS_AT_ONCE = 64
"""Tokens that a threadgroup takes in a turn."""
UNPACKING = 8
"""Simdgroups of a threadgroup that unpacks tokens."""
THREADGROUPS = {"cuda": 132, "metal": 264}
"""That attend at once, one for each of an H100's multiprocessors on CUDA: a context has no more parts than these."""
MOST_SUMS = 1024
"""Sums of values of a threadgroup on CUDA up to which there are registers for 16 simdgroups, beyond it for 8."""
SUMMING = 24 << 10
"""Bytes of threadgroup memory for sums of values: of as many simdgroups as there is room for at the same time."""

ATTEND = Kernel(
    name="turboquant_attention",
    sources=("attention_units.metal",),
    inputs=("queries", "k_fixed", "keys", "k_scales", "v_fixed", "values", "v_scales", "length", "bias"),
    outputs=("out",),
    large_memory=2 * PAIR_TABLE,
)

JOIN = Kernel(
    name="turboquant_attention_parts",
    sources=("attention.metal",),
    inputs=("parts", "sinks", "fixed"),
    outputs=("out",),
)

UNPACK = Kernel(
    name="turboquant_unpack_tokens",
    sources=("unpack_tokens.metal",),
    inputs=("fixed", "codes", "scales", "length"),
    outputs=("out",),
)

PACK = Kernel(
    name="turboquant_pack_cache",
    sources=("pack_cache.metal",),
    inputs=("x", "fixed", "codebook"),
    outputs=("codes", "scales"),
)


@dataclass(frozen=True, eq=False)
class HeadCode:
    """A `CacheCode` as kernels take it: its arrays, made once, and its numbers."""

    bits: int
    size: int
    group: int
    odd: int
    power: int
    fixed: mx.array
    codebook: mx.array

    @staticmethod
    def of(codebook: tuple[float, ...], group: int, signs: mx.array | None, block: int, size: int) -> "HeadCode":
        """The code of heads of `size` values in groups of `group`."""
        odd, power = factors(block)
        return HeadCode(
            bits_of(codebook), size, group, odd, power, fixed_words(token_table(codebook), signs, size),
            table(codebook),
        )  # fmt: skip


def fits(codebook: tuple[float, ...], size: int) -> bool:
    """Whether the kernels take heads of this size and code; of 8 bits they know the even grid from -1 to 1 only."""
    bits = bits_of(codebook)
    known = (
        np.allclose(codebook, np.linspace(-1, 1, 256), atol=1e-6) if bits == 8 else bits in BITS and symmetric(codebook)
    )
    return known and size % 16 == 0 and size <= 256


def token_table(codebook: tuple[float, ...]) -> mx.array:
    """What kernels decode a token's codes with, see `table_words`: codes 0 to 7, of 4 bits the negative magnitudes.

    Zeros for 8 bits, which need none.
    """
    if bits_of(codebook) == 8:
        return made(mx.zeros((4,), mx.uint32))
    values = np.array(codebook, np.float16)
    return table_words(-values[8:] if len(codebook) == 16 else values)


def pack(x: mx.array, code: HeadCode) -> tuple[mx.array, mx.array]:
    """Codes and scales of keys or values x (..., size), see `metal_kernels.pack_cache`."""
    return _compiled_pack(code)(x) if x.size <= FEW * code.size else _pack(x, code)


@cache
def _compiled_pack(code: HeadCode) -> Callable[[mx.array], tuple[mx.array, mx.array]]:
    """Compiled, a launch takes a processor a fraction of the time."""
    return mx.compile(lambda x: _pack(x, code))


def _pack(x: mx.array, code: HeadCode) -> tuple[mx.array, mx.array]:
    heads, leading = x.size // code.size, x.shape[:-1]
    constants = {
        "BITS": code.bits, "SIZE": code.size, "GROUP": code.group, "ODD": code.odd, "POWER": code.power, "T": x.dtype,
    }  # fmt: skip
    outputs = [
        ((*leading, code.size * code.bits // 32), mx.uint32),
        ((*leading, code.size // code.group), mx.float16),
    ]
    codes, scales = PACK.launch([x, code.fixed, code.codebook], outputs, (heads, 1), SIMD, constants)
    return codes, scales


def unpack(
    tokens: tuple[mx.array, mx.array], code: HeadCode, heads: range, length: int, dtype: mx.Dtype, gpu: Gpu
) -> mx.array:
    """The first `length` keys or values of some of the heads, rotated as they are: (B, len(heads), length, size)."""
    batch, all_heads = tokens[0].shape[:2]
    constants = {
        "BITS": code.bits, "GROUP": code.group, "SIZE": code.size, "HEADS": all_heads, "FIRST": heads.start,
        "COUNT": len(heads), "THREADS": SIMD * UNPACKING, "NVIDIA": gpu == "cuda", "T": dtype,
    }  # fmt: skip
    turns = -(-length // 2) * code.size // 8
    groups = -(-turns // (SIMD * UNPACKING)), batch * len(heads)
    out = (batch, len(heads), length, code.size), dtype
    inputs = [code.fixed, *tokens, number(length)]
    return UNPACK.launch(inputs, [out], groups, SIMD * UNPACKING, constants)[0]


@dataclass(frozen=True)
class Kind:
    """What an attention is compiled for."""

    keys: HeadCode
    values: HeadCode
    scale: float
    causal: bool
    gpu: Gpu


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
    """Attention over the first `length` tokens: (B, H, L, value size), in the original domain, in queries' dtype.

    bias: additive float32 (B or 1, H or 1, L or 1, length or 1), or None. A context is split by the room for tokens
    that keys and values have, so that few queries are compiled again only when that grows.
    """
    keys, values = _roomy(keys), _roomy(values)
    if bias is not None and bias.size < FEW_VALUES:
        bias = mx.broadcast_to(bias, (*bias.shape[:3], length))
        bias = mx.pad(bias, [(0, 0)] * 3 + [(0, max(0, FEW_VALUES - length))])
    few = bias is None and queries.shape[2] <= FEW_QUERIES
    run = _compiled_attend(kind) if few else partial(_attend, kind)
    return run(queries, *keys, *values, number(length), bias, sinks)


def _roomy(tokens: tuple[mx.array, mx.array]) -> tuple[mx.array, mx.array]:
    """Codes and scales with room for so many tokens that they are `long_enough` as they are."""
    if tokens[0].size >= FEW_VALUES:
        return tokens
    codes, scales = (mx.pad(array, [(0, 0), (0, 0), (0, FEW_VALUES), (0, 0)]) for array in tokens)
    return codes, scales


@cache
def _compiled_attend(kind: Kind) -> Callable[..., mx.array]:
    return mx.compile(partial(_attend, kind))


def _attend(
    kind: Kind,
    queries: mx.array,
    key_codes: mx.array,
    key_scales: mx.array,
    value_codes: mx.array,
    value_scales: mx.array,
    length: mx.array,
    bias: mx.array | None,
    sinks: mx.array | None,
) -> mx.array:
    parts = attend_parts(kind, queries, (key_codes, key_scales), (value_codes, value_scales), length, bias)
    joining = JOINING if parts.shape[1] > 1 else 1
    batch, heads, rows, _ = queries.shape
    code = kind.values
    constants = {
        "SIZE": code.size, "ODD": code.odd, "POWER": code.power, "SIMDGROUPS": joining, "SINKS": sinks is not None,
        "HEADS": heads, "T": queries.dtype,
    }  # fmt: skip
    inputs = [parts, constant(0.0) if sinks is None else sinks.astype(mx.float32), code.fixed]
    out = ((batch, heads, rows, code.size), queries.dtype)
    return JOIN.launch(inputs, [out], (rows, batch * heads), SIMD * joining, constants)[0]


def attend_parts(
    kind: Kind,
    queries: mx.array,
    keys: tuple[mx.array, mx.array],
    values: tuple[mx.array, mx.array],
    length: mx.array,
    bias: mx.array | None,
) -> mx.array:
    """Attention to some parts of a context of `length[0]` tokens: float32 (B * H * L, parts, value size + 2).

    For each part weighted sums in the rotated domain, and maximum and total of the scores, in powers of two.
    """
    of_keys, of_values = kind.keys, kind.values
    batch, heads, rows, _ = queries.shape
    kv_heads, room = keys[0].shape[1:3]
    rows_of_head = heads // kv_heads * rows
    rows_at_once = 4 if kind.gpu != "cuda" else 8 if rows_of_head <= 8 else 16
    most_size = max(of_keys.size, of_values.size)
    simdgroups = 4 if kind.gpu != "cuda" else 16 if rows_at_once * most_size <= MOST_SUMS else 8
    slots = min(simdgroups, SUMMING // (4 * rows_at_once * most_size))
    tiles = -(-rows_of_head // rows_at_once) * batch * kv_heads
    factor = kind.scale * math.log2(math.e) / math.sqrt(of_keys.odd * of_keys.power)
    constants = {
        "KEY_BITS": of_keys.bits, "VALUE_BITS": of_values.bits, "KEY_SIZE": of_keys.size,
        "VALUE_SIZE": of_values.size, "KEY_GROUP": of_keys.group, "VALUE_GROUP": of_values.group,
        "KEY_ODD": of_keys.odd, "KEY_POWER": of_keys.power, "FACTOR": float_bits(factor), "ROWS": rows_at_once,
        "SIMDGROUPS": simdgroups, "SLOTS": slots, "MASK": 1 if kind.causal else 0 if bias is None else 2,
        "SAME": of_keys.codebook is of_values.codebook, "NVIDIA": kind.gpu == "cuda", "T": queries.dtype,
    }  # fmt: skip
    parts = parts_of(room, THREADGROUPS[kind.gpu] // tiles, TOKENS_AT_ONCE)
    out = ((batch * heads * rows, parts, of_values.size + 2), mx.float32)
    inputs = [queries, of_keys.fixed, *keys, of_values.fixed, *values, length, _no_bias() if bias is None else bias]
    return ATTEND.launch(inputs, [out], (parts, tiles), SIMD * simdgroups, constants)[0]


def parts_of(room: int, most: int, tokens: int) -> int:
    """How many parts a context of `room` has, each a multiple of `tokens`, at most `most` of them, or one."""
    chunk = -(-max(room, 1) // max(1, most))
    return -(-max(room, 1) // (-(-chunk // tokens) * tokens))


@cache
def _no_bias() -> mx.array:
    return made(mx.zeros((1, 1, 1, 8)))
