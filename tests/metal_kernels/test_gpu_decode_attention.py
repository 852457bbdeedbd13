"""The kernel of attention of a new token, on this machine's GPU or an emulated one, against plain MLX in float32."""

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import pytest

from metal_kernels import Norm
from metal_kernels.gpu import decode_attention as gpu
from tests.metal_kernels.host.machine import EmulatorError, on_emulator, on_machine


def normal(*shape: int, seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


@dataclass
class Case:
    """A step's arrays: `held` tokens in `room`, `waits` that wait; what was not written yet is not a number."""

    batch: int
    heads: gpu.Heads
    held: int
    waits: int
    room: int
    dtype: mx.Dtype

    def __post_init__(self) -> None:
        own, shape = self.heads, (self.batch, self.heads.kv_count, self.room, self.heads.size)
        self.stacked = normal(self.batch, (own.count + 2 * own.kv_count) * own.size, seed=1).astype(self.dtype)
        angles = mx.arange(own.size // 2) * 0.37
        self.turns = mx.concatenate([mx.cos(angles), mx.sin(angles)])
        there = (mx.arange(self.room) < self.held)[:, None]
        self.keys, self.values = (mx.where(there, normal(*shape, seed=i), mx.nan).astype(self.dtype) for i in (2, 3))
        there = (mx.arange(gpu.WAITING) < self.waits)[:, None]
        waiting = normal(2, *shape[:2], gpu.WAITING, own.size, seed=4)
        self.waiting = mx.where(there, waiting, mx.nan).astype(self.dtype)

    @property
    def kept(self) -> mx.array:
        return mx.concatenate([self.heads.room(self.batch, self.dtype)[: -self.waiting.size], self.waiting.reshape(-1)])

    def run(self) -> list[mx.array]:
        state = gpu.state_of(self.held, self.waits)
        kept = gpu.decode_attention(self.stacked, self.turns, (self.kept, self.keys, self.values), state, self.heads)
        return [self.heads.seen(kept, self.batch), self.heads.waiting(kept, self.batch)]

    def right(self) -> tuple[mx.array, mx.array]:
        """The result, and the rows of keys and values that wait then, in float32."""
        own = self.heads
        rows = self.stacked.astype(mx.float32).reshape(self.batch, -1, 1, own.size)
        q, k, v = mx.split(rows, [own.count, own.count + own.kv_count], axis=1)
        if own.norms:
            q, k = (mx.fast.rms_norm(x, norm.weight, norm.eps) for x, norm in zip((q, k), own.norms, strict=True))
        q, k = self._turned(q), self._turned(k)
        now = mx.concatenate([self.waiting[..., : self.waits, :], mx.stack([k, v])], axis=3)
        keys, values = (
            mx.concatenate([old[:, :, : self.held], new], axis=2)
            for old, new in zip((self.keys, self.values), now, strict=True)
        )
        seen = mx.fast.scaled_dot_product_attention(q, keys, values, scale=own.scale)
        return seen.reshape(self.batch, -1), now

    def _turned(self, x: mx.array) -> mx.array:
        one, two = mx.split(x, 2, axis=-1)
        cos, sin = mx.split(self.turns, 2)
        return mx.concatenate([one * cos - two * sin, one * sin + two * cos], axis=-1)


def heads(count: int, kv_count: int, size: int, normed: bool = False) -> gpu.Heads:
    norms = Norm(1 + 0.1 * normal(size, seed=7), 1e-6), Norm(1 + 0.1 * normal(size, seed=8), 1e-6)
    return gpu.Heads(count, kv_count, size, size**-0.5, norms if normed else None)


CASES = {
    "nothing before": Case(1, heads(4, 2, 64), 0, 0, 256, mx.float32),
    "all wait": Case(2, heads(4, 2, 64), 0, 31, 256, mx.float32),
    "many": Case(2, heads(8, 2, 128), 150, 5, 256, mx.float16),
    "odd groups in two parts": Case(1, heads(7, 1, 128), 70, 3, 256, mx.float32),
    "norms, a full cache": Case(1, heads(4, 2, 80, normed=True), 256, 31, 256, mx.float32),
    "wide heads": Case(1, heads(6, 2, 256), 33, 1, 256, mx.bfloat16),
}
TOLERANCE = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 1.5e-2}


def check(folder: Path, cases: dict[str, Case], *edits: tuple[str, str]) -> None:
    def run() -> list[mx.array]:
        return [a for case in cases.values() for a in case.run()]

    found = iter(on_emulator(folder, run, *edits) if edits else on_machine(folder, run))
    for name, case in cases.items():
        seen, waiting = case.right()
        assert mx.abs(next(found) - seen).max() < TOLERANCE[case.dtype] * mx.abs(seen).max(), name
        joined = next(found)[..., : case.waits + 1, :]
        assert mx.array_equal(joined[..., : case.waits, :], case.waiting[..., : case.waits, :]), name
        assert mx.abs(joined - waiting).max() < TOLERANCE[case.dtype] * mx.abs(waiting).max(), name


def test_attention_of_a_new_token_is_that_of_plain_mlx(tmp_path: Path) -> None:
    check(tmp_path, CASES)


def test_parts_of_a_context_give_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "ALONE", 0)
    monkeypatch.setattr(gpu, "PART", 64)
    check(tmp_path, {name: CASES[name] for name in ("nothing before", "many", "odd groups in two parts")})


FAULTS = {
    "a barrier left out": ("lane);\nturboquant::barrier();\n", "lane);\n"),
    "a wrong distance": ("score += shuffle_xor(score, 4);", "score += shuffle_xor(score, 8);"),
    "a row off": ("value_row = key_row + KV_HEADS;", "value_row = key_row + KV_HEADS - 1;"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_kernel_shows(tmp_path: Path, fault: str) -> None:
    with pytest.raises((AssertionError, EmulatorError)):
        check(tmp_path, {"many": Case(1, heads(4, 1, 64), 50, 5, 64, mx.float32)}, FAULTS[fault])
