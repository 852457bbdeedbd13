"""Machines that are not there."""

from collections.abc import Generator

import mlx.core as mx
import pytest

from metal_kernels.gpu.architecture import architecture, fault


@pytest.fixture
def nvidia(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Generator[None]:
    """An NVIDIA GPU of the architecture that is the parameter."""
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda _: {"architecture": request.param})
    for known in (architecture, fault):
        known.cache_clear()
    yield
    for known in (architecture, fault):
        known.cache_clear()
