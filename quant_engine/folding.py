"""Norms, and the rotation of the residual stream, folded into the weights beside it before they are quantized.

An RMS norm without a weight commutes with a rotation, so a model whose residual stream is rotated from end to end
computes the same (Ashkboos et al., SliceGPT, arXiv 2401.15024, section 3; QuaRot, arXiv 2404.00456, section 4). With R
the rotation of rows, x -> x R, and g the weight of a norm, which becomes one:

    embeddings                                       E -> E R
    layers that read the stream: q, k, v; gate, up; head  W -> W diag(g) R
    layers that write to it: attention's output, down     W -> R^T W, b -> b R

Readers' inputs then come rotated, and only those of writers are rotated at run time. Tied embeddings would have to be
two matrices: they and the last norm stay as they are, the model rotates the rows that it looks up, and turns the stream
back before the last norm (see `stream_ends`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from metal_kernels import rotate, unrotate
from quant_engine import mlx_lm_adapter as adapter
from quant_engine import rotation
from quant_engine.config import QuantConfig
from quant_engine.errors import RecipeError, UnsupportedModelError

EMBEDDINGS, LAST_NORM, HEAD = "model.embed_tokens", "model.norm", "lm_head"

_MODELS = ("llama", "qwen2", "qwen3")
"""mlx-lm's models whose layers are x + attention(norm(x)), then x + feed-forward(norm(x)); mistral is its llama."""

_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
_WRITERS = ("self_attn.o_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Folding:
    """What is folded into which parameters of a model, by their names.

    width, block, seed: of the stream's rotation. tied: whether embeddings and last norm stay. norms: the norm that each
    reader's weight takes in. rows: parameters whose rows are rotated: readers, embeddings, writers' biases. outputs:
    writers' weights.
    """

    width: int
    block: int
    seed: int
    tied: bool
    norms: Mapping[str, str]
    rows: frozenset[str]
    outputs: frozenset[str]

    @classmethod
    def of(cls, config: Mapping[str, Any], recipe: QuantConfig) -> "Folding":
        """The folding of the model of a config.json.

        Raises UnsupportedModelError for an architecture that has no place for it, RecipeError where its width has no
        Hadamard block, and as `mlx_lm_adapter.build` does.
        """
        model = adapter.build(config)
        _check(model, config.get("model_type"))
        width = cast(mx.array, adapter.linear_modules(model)["model.layers.0.self_attn.q_proj"]["weight"]).shape[1]
        block = rotation.choose_block(width, recipe.rotation)
        if block == 1:
            raise RecipeError(f"a hidden size of {width} has no Hadamard block to fold; leave fold_rotation off")
        return cls._named(
            adapter.layer_count(model), width, block, recipe.seed, HEAD not in adapter.linear_modules(model)
        )

    @classmethod
    def _named(cls, layers: int, width: int, block: int, seed: int, tied: bool) -> "Folding":
        norms: dict[str, str] = {}
        outputs: set[str] = set()
        rows: set[str] = set()
        for layer in (f"model.layers.{i}" for i in range(layers)):
            for norm, readers in _READERS.items():
                norms |= {f"{layer}.{reader}.weight": f"{layer}.{norm}.weight" for reader in readers}
            outputs |= {f"{layer}.{writer}.weight" for writer in _WRITERS}
            rows |= {f"{layer}.{writer}.bias" for writer in _WRITERS}
        if not tied:
            norms[f"{HEAD}.weight"] = f"{LAST_NORM}.weight"
            rows.add(f"{EMBEDDINGS}.weight")
        return cls(width, block, seed, tied, norms, frozenset(rows | norms.keys()), frozenset(outputs))

    def rotate(self, rows: mx.array) -> mx.array:
        """Rows (n, width) times R, float32."""
        return rotate(rows.astype(mx.float32), self._signs, self.block)

    def unrotate(self, rows: mx.array) -> mx.array:
        """The inverse of `rotate`."""
        return unrotate(rows.astype(mx.float32), self._signs, self.block)

    @property
    def _signs(self) -> mx.array:
        return mx.array(rotation.signs(self.width, self.seed))


def _check(model: nn.Module, model_type: Any) -> None:
    if type(model).__module__.rpartition(".")[2] not in _MODELS:
        raise UnsupportedModelError(
            f"fold_rotation does not fit {model_type!r}: {_obstacle(model)}. It fits llama, mistral, qwen2 and qwen3, "
            "whose layers read the residual stream through an RMS norm and add to it directly; leave it off"
        )


def _obstacle(model: nn.Module) -> str:
    """What of a model keeps the rotation from being folded, in words."""
    paths = [path for path, _ in cast(list[tuple[str, nn.Module]], model.named_modules())]
    norms = {found[1] for path in sorted(paths) if (found := re.search(r"layers\.\d+\.(\w*norm\w*)$", path))}
    if experts := adapter.expert_modules(model):
        return f"it has experts ({next(iter(experts))})"
    if layer_norms := adapter.linear_modules(model, (nn.LayerNorm,)):
        return f"its norms take the mean away (LayerNorm: {next(iter(layer_norms))})"
    if others := sorted(norms - _READERS.keys()):
        return f"its layers have other norms ({', '.join(others)})"
    return "how its layers read the residual stream is not known here"
