"""The model that was used last, kept in memory for the next call."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from quant_engine.loader import load
from quant_engine.progress import Progress, silent


@dataclass(frozen=True)
class _Held:
    key: tuple[str, int]
    model: nn.Module
    tokenizer: Any


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

    def forget(self) -> None:
        """Free the memory."""
        self._held = None
        mx.clear_cache()


def _key(ref: str | Path) -> tuple[str, int]:
    """Changes when a folder is replaced."""
    config = Path(ref) / "config.json"
    return str(ref), config.stat().st_mtime_ns if config.exists() else 0
