"""Whether GPU kernels work where they have never run: each is tried on a small case before it is relied on."""

import warnings
from collections.abc import Callable, Mapping
from functools import cache

import mlx.core as mx

from metal_kernels import reference
from metal_kernels.gpu import attention, decode_attention, experts, products, quantize, tiles
from metal_kernels.gpu.products import Gpu
from metal_kernels.launch import number

TOLERANCE = 0.02
"""Of the largest value: what rounding to float16 leaves far below, and a wrong lane does not."""

BITS, GROUP, ROWS, WIDTH, TOKENS = 3, 32, 40, 128, 40
MANY = 80
"""Rows of activations that are many for every kernel."""
_CODEBOOK = (-2.152, -1.344, -0.756, -0.2451, 0.2451, 0.756, 1.344, 2.152)


@cache
def works(operation: str, gpu: Gpu) -> bool:
    """Whether an operation's kernels compile and give the reference's result; warns, and says why, where not."""
    try:
        ours, right = _CASES[operation](gpu)
        off = float(mx.abs(ours.astype(mx.float32) - right).max() / mx.abs(right).max())
        reason = "" if off <= TOLERANCE else f"its result is off by {off:.0%}"
    except (RuntimeError, ValueError) as error:
        reason = _first_fault(str(error)) or type(error).__name__
    if reason:
        warnings.warn(
            f"the {gpu} kernel for {operation} does not work on this machine: {reason}. MLX's own operations take its "
            "place, which are slower; please report it with what `tq-mcp doctor` prints",
            RuntimeWarning,
            stacklevel=2,
        )
    return not reason


def _first_fault(text: str) -> str:
    """Of what was said the first line, and what a compiler found first."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return ": ".join([*lines[:1], *[line for line in lines[1:] if "error:" in line][:1]])


def _matrix(seed: int) -> tuple[mx.array, mx.array]:
    matrix = mx.random.normal((ROWS, WIDTH), key=mx.random.key(seed))
    return reference.quantize(matrix, _CODEBOOK, GROUP, search=False)


def _signs() -> mx.array:
    return mx.where(mx.random.uniform(shape=(WIDTH,), key=mx.random.key(9)) < 0.5, -1.0, 1.0)


def _activations(*shape: int) -> mx.array:
    return mx.random.normal((*shape, WIDTH), key=mx.random.key(1)).astype(mx.float16)


def _product(gpu: Gpu) -> tuple[mx.array, mx.array]:
    """Of few rows and of many, which have kernels of their own."""
    x, signs, codes = _activations(MANY), _signs(), _matrix(0)
    weight = tiles.arrange(*codes, _CODEBOOK, gpu, signs, WIDTH)
    right = reference.matmul(reference.rotate(x.astype(mx.float32), signs, WIDTH), *codes, _CODEBOOK)
    ours = [products.product(rows, weight, gpu) for rows in (x[:3], x)]
    return mx.concatenate(ours), mx.concatenate([right[:3], right])


def _gated(gpu: Gpu) -> tuple[mx.array, mx.array]:
    x, signs, (codes, scales) = _activations(2), _signs(), _matrix(0)
    both = mx.concatenate([codes] * 7)[: 2 * WIDTH], mx.concatenate([scales] * 7)[: 2 * WIDTH]
    first = tiles.arrange(*both, _CODEBOOK, gpu, signs, WIDTH)
    second = tiles.arrange(codes, scales, _CODEBOOK, gpu, signs, WIDTH)
    rotated = reference.rotate(x.astype(mx.float32), signs, WIDTH)
    gate, up = reference.matmul(rotated, *both, _CODEBOOK).split(2, axis=-1)
    inner = reference.rotate(gate * mx.sigmoid(gate) * up, signs, WIDTH)
    return products.gated_product(x, first, second, gpu), reference.matmul(inner, codes, scales, _CODEBOOK)


def _experts(gpu: Gpu) -> tuple[mx.array, mx.array]:
    """Of pairs of a row and an expert, and of rows in the order of their experts, few and many."""
    signs, each, made = _signs(), [_matrix(e) for e in range(3)], list[tuple[mx.array, mx.array]]()
    weight = experts.stack([tiles.arrange(*codes, _CODEBOOK, gpu, signs, WIDTH) for codes in each])
    values = [reference.dequantize(*codes, _CODEBOOK) for codes in each]
    pairs = _activations(2, 1, 1), mx.array([[2, 0], [1, 2]], dtype=mx.uint32)
    in_order = [(_activations(n, 1), mx.arange(n, dtype=mx.uint32) * 3 // n) for n in (9, MANY)]
    for x, chosen in (pairs, *in_order):
        rotated = reference.rotate(x.astype(mx.float32), signs, WIDTH)
        ours = experts.expert_product(x, weight, chosen, chosen.ndim == 1, gpu)
        made.append((ours.reshape(-1), reference.expert_matmul(rotated, values, chosen).reshape(-1)))
    return mx.concatenate([ours for ours, _ in made]), mx.concatenate([right for _, right in made])


def _head() -> attention.HeadCode:
    return attention.HeadCode.of(_CODEBOOK, GROUP, _signs(), WIDTH, WIDTH)


def _packing(gpu: Gpu) -> tuple[mx.array, mx.array]:
    x = _activations(1, 2, 3)
    rotated = reference.rotate(x.astype(mx.float32), _signs(), WIDTH)
    packed = (attention.pack(x, _head()), reference.pack_cache(rotated, _CODEBOOK, GROUP))
    return _all_but_few(*(reference.dequantize(codes, scales, _CODEBOOK) for codes, scales in packed))


def _quantizing(_: Gpu) -> tuple[mx.array, mx.array]:
    x = mx.random.normal((ROWS, WIDTH), key=mx.random.key(3))
    coded = (run(x, _CODEBOOK, GROUP, True) for run in (quantize.quantize, reference.quantize))
    return _all_but_few(*(reference.dequantize(codes, scales, _CODEBOOK) for codes, scales in coded))


def _all_but_few(ours: mx.array, right: mx.array) -> tuple[mx.array, mx.array]:
    """How far values are apart, on top of one, and one; without the tenth of them that is: between two codes, a value
    may go to either."""
    return mx.sort(mx.abs(ours - right), axis=None)[: ours.size * 9 // 10] + 1, mx.ones((ours.size * 9 // 10,))


def _attention(gpu: Gpu) -> tuple[mx.array, mx.array]:
    """Of a few rows of queries, and what is unpacked for many."""
    q, rotated = _activations(1, 4, 1), mx.random.normal((2, 1, 2, TOKENS, WIDTH), key=mx.random.key(2))
    keys, values = (reference.pack_cache(x, _CODEBOOK, GROUP) for x in rotated)
    kind, options = attention.Kind(_head(), _head(), WIDTH**-0.5, causal=False, gpu=gpu), {"bias": None, "sinks": None}
    ours = attention.attend(q, keys, values, kind, length=TOKENS, **options)
    loose = attention.unpack(keys, _head(), range(2), TOKENS, mx.float16, gpu)
    turned = reference.rotate(q.astype(mx.float32), _signs(), WIDTH)
    right = reference.packed_attention(turned, keys, values, (_CODEBOOK, _CODEBOOK), WIDTH**-0.5, None, None)
    right = reference.unrotate(right, _signs(), WIDTH)
    both = (right, reference.dequantize(*keys, _CODEBOOK))
    return mx.concatenate([ours.reshape(-1), loose.reshape(-1)]), mx.concatenate([x.reshape(-1) for x in both])


def _decoding(gpu: Gpu) -> tuple[mx.array, mx.array]:
    """Over a short context, a long one in parts, and a packed one."""
    heads, waits, held = decode_attention.Heads(4, 2, WIDTH, WIDTH**-0.5, None), 4, TOKENS - 4
    tokens = _activations(1, 2, 2, TOKENS).transpose(1, 0, 2, 3, 4)
    stacked, turns = _activations(8).reshape(1, -1), mx.repeat(mx.array([1.0, 0.0]), WIDTH // 2)
    waiting = mx.pad(tokens[..., held:, :], [(0, 0)] * 3 + [(0, decode_attention.WAITING - waits), (0, 0)])
    kept = mx.concatenate([mx.zeros((4 * WIDTH,), mx.float16), waiting.reshape(-1)])
    state, made = decode_attention.state_of(held, waits), list[mx.array]()
    for room in (2 * TOKENS, decode_attention.ALONE + TOKENS):
        keys, values = mx.pad(tokens[..., :held, :], [(0, 0)] * 3 + [(0, room - held), (0, 0)])
        made.append(decode_attention.decode_attention(stacked, turns, (kept, keys, values), state, heads))
    turned = reference.rotate(tokens[..., :held, :].astype(mx.float32), _signs(), WIDTH)
    packed = [reference.pack_cache(x, _CODEBOOK, GROUP) for x in turned]
    arrays, codes, late = (kept, *packed[0], *packed[1]), (_head(), _head()), number(held)
    made.append(decode_attention.packed_decode_attention(stacked, turns, arrays, state, late, heads, codes, gpu))
    q, new = stacked.reshape(1, 8, 1, WIDTH)[:, :4], stacked.reshape(1, 4, 2, 1, WIDTH)[:, 2:].transpose(1, 0, 2, 3, 4)
    coded = reference.unrotate(mx.stack([reference.dequantize(*x, _CODEBOOK) for x in packed]), _signs(), WIDTH)
    right = list[mx.array]()
    for early in (tokens[..., :held, :], tokens[..., :held, :], coded):
        k, v = mx.concatenate([early, tokens[..., held:, :], new], axis=3).astype(mx.float32)
        right.append(mx.fast.scaled_dot_product_attention(q.astype(mx.float32), k, v, scale=heads.scale))
    return mx.stack([heads.seen(one, 1) for one in made]), mx.stack([one.reshape(1, -1) for one in right])


_CASES: Mapping[str, Callable[[Gpu], tuple[mx.array, mx.array]]] = {
    "matmul": _product,
    "feed_forward": _gated,
    "expert_matmul": _experts,
    "pack_cache": _packing,
    "quantize": _quantizing,
    "packed_attention": _attention,
    "decode_attention": _decoding,
}
