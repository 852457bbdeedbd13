"""What is quantized at what width, and why the rest is kept as it came."""

from dataclasses import dataclass

from quant_engine.config import QuantConfig
from quant_engine.errors import RecipeError
from quant_engine.quantizer import check_width
from quant_engine.rotation import choose_block

EMBEDDINGS = ("embed_tokens", "wte", "embeddings", "word_embeddings", "tok_embeddings")
HEADS = ("lm_head", "output", "embed_out")
ROUTERS = ("gate", "router", "shared_expert_gate")


@dataclass(frozen=True)
class Decision:
    """Whether a module's weight is quantized, at how many bits (0: not), and the reason where it is not."""

    quantize: bool
    bits: int = 0
    reason: str = ""


def decide(path: str, shape: tuple[int, ...], config: QuantConfig, *, keep_unfitting: bool = False) -> Decision:
    """What becomes of the module at `path` whose weight has `shape`, (out, in) for linear layers.

    Raises RecipeError, naming module and what fits, where the recipe's groups or rotation do not fit its
    width; with keep_unfitting such a module is kept in full precision instead.
    """
    reason = _reason_to_keep(path, shape)
    if reason:
        return Decision(False, reason=reason)
    try:
        check_width(shape[1], config.group_size)
        choose_block(shape[1], config.rotation)
    except RecipeError as error:
        if keep_unfitting:
            return Decision(False, reason=str(error))
        raise RecipeError(f"{path}: {error}; or keep such modules in full precision (keep_unfitting)") from error
    return Decision(True, config.bits)


def _reason_to_keep(path: str, shape: tuple[int, ...]) -> str:
    parts = path.split(".")
    name = parts[-1]
    if name in EMBEDDINGS:
        return "embeddings"
    if name in HEADS:
        return "output projection"
    if name in ROUTERS:
        return "router"
    if "norm" in name:
        return "norm"
    if "conv" in name:
        return "convolution"
    return "" if len(shape) == 2 else "not a matrix"
