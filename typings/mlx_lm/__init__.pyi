from typing import Any

from mlx_lm.generate import GenerationResponse as GenerationResponse
from mlx_lm.generate import generate as generate
from mlx_lm.generate import stream_generate as stream_generate
from mlx_lm.utils import load as load

def __getattr__(name: str) -> Any: ...
