"""Small checkpoints with the structure of published ones, made from stored outlines without their authors' code.

An outline is what a checkpoint of transformers has: config, tensor names, dtypes and shapes; `references/` holds one
for each architecture, with logits that transformers computed. Values are a function of a tensor's name, so that
whoever makes the checkpoint makes the same.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

REFERENCES = Path(__file__).resolve().parent / "references"
NAMES = tuple(sorted(path.stem for path in REFERENCES.glob("*.json")))
TOKENS = (3, 41, 59, 26, 53, 58, 9, 79, 32, 38, 46, 26)
"""The prompt whose logits are stored."""


def values(name: str, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """A tensor's values: uniform, of a variance that keeps activations near one; bytes for packed weights."""
    random = np.random.Generator(np.random.Philox(key=zlib.crc32(name.encode())))
    if name.endswith("_blocks"):
        return random.integers(0, 256, shape, dtype=np.uint8)
    if name.endswith("_scales"):
        return random.integers(120, 123, shape, dtype=np.uint8)
    spread = random.random(shape, dtype=np.float32) * 2 - 1
    if name.endswith("A_log"):
        return np.log(1 + 7 * np.abs(spread))
    if "norm" in name:
        return 1 + 0.2 * spread
    return 0.1 * spread if len(shape) < 2 else spread * np.float32((3.0 / shape[-1]) ** 0.5)


def outline(name: str) -> dict[str, Any]:
    """The stored outline of an architecture."""
    return json.loads((REFERENCES / f"{name}.json").read_text())


def write_published(name: str, folder: Path) -> Path:
    """Write an architecture's checkpoint as its outline says, in as many files."""
    stored = outline(name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(stored["config"]))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_text("{}")
    weight_map: dict[str, str] = {}
    for file, tensors in stored["files"].items():
        arrays = {n: array(n, dtype, tuple(shape)) for n, (dtype, shape) in tensors.items()}
        mx.save_safetensors(str(folder / file), arrays, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    if len(stored["files"]) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def array(name: str, dtype: str, shape: tuple[int, ...]) -> mx.array:
    """The values as an MLX array of a dtype of the file format."""
    made = mx.array(values(name, dtype, shape))
    return made.astype({"BF16": mx.bfloat16, "F32": mx.float32, "U8": mx.uint8}[dtype])


def stored_logits(name: str) -> mx.array:
    """What transformers computed for TOKENS: float32 (tokens, vocabulary)."""
    return mx.array(np.load(REFERENCES / f"{name}.npy"))
