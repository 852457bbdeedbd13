"""The model that was used last, kept in memory for the next call."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from quant_engine.config import CacheConfig
from quant_engine.generate import generate
from quant_engine.loader import load
from quant_engine.progress import Progress, silent

WARM_UP_CHARACTERS = 200


@dataclass(frozen=True)
class _Held:
    key: tuple[str, int]
    model: nn.Module
    tokenizer: Any
    warm: set[CacheConfig | None] = field(default_factory=set[CacheConfig | None])


class LoadedModel:
    """Holds one model. MLX ties arrays to threads: use an instance from one thread only."""

    def __init__(self) -> None:
        self._held: _Held | None = None

    def get(self, ref: str | Path, progress: Progress = silent) -> tuple[nn.Module, Any]:
        """The model and tokenizer of a folder or repository, loaded unless they are those held."""
        key = _key(ref)
        if self._held is None or self._held.key != key:
            self.forget()
            model, tokenizer = load(ref, progress=progress)
            self._held = _Held(key, model, tokenizer)
        return self._held.model, self._held.tokenizer

    def warm_up(self, prompt: str, caches: Sequence[CacheConfig | None]) -> None:
        """Generate a little with each cache that this model was not used with yet, so that what is measured next
        holds no compiling and no first touch of memory."""
        if self._held is None:
            return
        for cache in caches:
            if cache not in self._held.warm:
                start = prompt.strip()[:WARM_UP_CHARACTERS]
                generate(self._held.model, self._held.tokenizer, start, max_tokens=3, chat=False, cache=cache)
                self._held.warm.add(cache)

    def forget(self) -> None:
        """Free the memory."""
        self._held = None
        mx.clear_cache()


def _key(ref: str | Path) -> tuple[str, int]:
    """Changes when a folder is replaced."""
    config = Path(ref) / "config.json"
    return str(ref), config.stat().st_mtime_ns if config.exists() else 0
