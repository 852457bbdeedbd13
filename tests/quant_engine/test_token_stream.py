"""The pace of new tokens, where a step is computed when it is begun, and where it runs beside what follows."""

from dataclasses import dataclass
from itertools import islice
from typing import Any

import pytest

from quant_engine import token_stream
from quant_engine.token_stream import TokenStream

STEP_S = 2.0
USE_S = 0.25
"""Putting a token to use takes so long, in which a GPU goes on."""


@dataclass
class Machine:
    """A clock, and a processor that takes STEP_S for each token."""

    beside: bool
    now: float = 100.0
    free_at: float = 0.0
    steps: int = 0

    def step(self, *_: Any, **__: Any) -> "Token":
        self.steps += 1
        self.free_at = max(self.free_at, self.now) + STEP_S
        if not self.beside:
            self.now = self.free_at
        return Token(self, self.free_at)


@dataclass
class Token:
    """Stands for logits and for the token that is chosen by them."""

    machine: Machine
    ready_at: float

    def __getitem__(self, _: Any) -> "Token":
        return self

    def item(self) -> int:
        self.machine.now = max(self.machine.now, self.ready_at)
        return 7


def pace(machine: Machine, limit: int, used: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, float]:
    """Of a stream of which `used` tokens are put to use."""
    monkeypatch.setattr(token_stream.time, "perf_counter", lambda: machine.now)
    monkeypatch.setattr(token_stream.mx, "async_eval", lambda token: token)
    monkeypatch.setattr(token_stream.mx, "eval", lambda token: token.item())
    model: Any = machine.step
    stream = TokenStream(model, 1, [], limit, lambda logits: logits)
    for _ in islice(stream, used):
        machine.now += USE_S
    return stream.pace()


@pytest.mark.parametrize("beside", [False, True], ids=["at once", "beside"])
@pytest.mark.parametrize(("limit", "used"), [(2, 2), (3, 3), (8, 8), (40, 40), (8, 2), (8, 3), (8, 7)])
def test_as_many_steps_are_counted_as_lie_in_the_time(
    beside: bool, limit: int, used: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(beside)
    steps, seconds = pace(machine, limit, used, monkeypatch)
    assert steps == machine.steps - 1 == min(used, limit - 1)
    in_use = USE_S if beside else USE_S * used
    assert STEP_S * steps <= seconds <= STEP_S * steps + in_use


@pytest.mark.parametrize("limit", [1, 8])
def test_one_token_has_no_pace(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(beside=False)
    assert pace(machine, limit, 1, monkeypatch) == (0, 0.0)
    assert machine.steps == 1, "the second step is begun only when a second token is asked for"
