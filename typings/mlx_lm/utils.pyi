from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.nn as nn

def load(path_or_hf_repo: str, *args: Any, **options: Any) -> tuple[nn.Module, Any]: ...
def load_model(
    model_path: Path,
    lazy: bool = False,
    strict: bool = True,
    model_config: dict[str, Any] | None = None,
    get_model_classes: Callable[[dict[str, Any]], tuple[Any, Any]] = ...,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, dict[str, Any]]: ...
def load_tokenizer(
    model_path: Path, tokenizer_config_extra: dict[str, Any] | None = None, eos_token_ids: Any = None
) -> Any: ...
def _get_classes(config: dict[str, Any]) -> tuple[Any, Any]: ...
def __getattr__(name: str) -> Any: ...
