"""What quantizing costs a model: perplexity, and distance from full precision, side by side on the same text."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

import metal_kernels
from quant_engine import mlx_lm_adapter as adapter
from quant_engine.config import QuantConfig
from quant_engine.errors import InputError, RecipeError
from quant_engine.folded_parameters import parameters_of
from quant_engine.loader import load_source, load_tokenizer
from quant_engine.parameters import Packing
from quant_engine.perplexity import Estimate, difference, perplexity, windows
from quant_engine.policy import Policy
from quant_engine.progress import Progress, Steps, silent
from quant_engine.prompt import check_context
from quant_engine.safetensors_file import TensorSpec
from quant_engine.score import Score, logits_array, score
from quant_engine.source import Source, resolve
from quant_engine.text import Text
from quant_engine.variants import FloatModel, Method, Recipe, Variant, converted, is_converted


@dataclass(frozen=True)
class EvaluationRow:
    """One variant's measurements.

    bits_per_weight: of the quantized layers, scales included. size_bytes: the whole model as stored. ppl_stderr:
    over windows, None for one window. kl: mean KL(float || variant) in nats a token; top1: share of tokens with
    the same most likely next token; both None where no float model was there to compare with.
    """

    method: Method
    bits: int | None
    group_size: int | None
    bits_per_weight: float
    size_bytes: int
    ppl: float
    ppl_stderr: float | None
    kl: float | None
    top1: float | None
    backend: str
    kernel_path: str


@dataclass(frozen=True)
class EvaluationReport:
    """Rows on the same windows of one text; tokens is how many were scored for each row.

    differences: for each row, its perplexity less the float row's, with a standard error that takes the windows
    as pairs; None where there is no float row. notes: what was left out, and why.
    """

    model: str
    text_name: str
    text_sha256: str
    seq_len: int
    num_samples: int
    tokens: int
    rows: tuple[EvaluationRow, ...]
    differences: tuple[Estimate | None, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values, `differences` and `notes` left out."""
        return {
            "model": self.model,
            "text": {"name": self.text_name, "sha256": self.text_sha256},
            "seq_len": self.seq_len,
            "num_samples": self.num_samples,
            "tokens": self.tokens,
            "rows": [asdict(row) for row in self.rows],
        }


def evaluate(
    ref: str | Path,
    *,
    bits: Sequence[int] = (2, 3, 4),
    group_size: int = 64,
    text: Text,
    seq_len: int = 512,
    num_samples: int = 32,
    affine: bool = True,
    qjl: bool = True,
    reference: str | Path | None = None,
    revision: str | None = None,
    progress: Progress = silent,
) -> EvaluationReport:
    """Measure a model in full precision and quantized, its linear layers as the conversion policy takes them.

    Rows: float, then for each of `bits` affine (MLX's own quantization of the same layers), turboquant, and
    turboquant+qjl; `affine` and `qjl` leave theirs out. A model converted already is measured as it is, with its
    own bits; float and affine rows join it where `reference`, the float model that it was made from, is given.
    Layers whose width the recipe does not fit are kept in all rows, as `convert` does with keep_unfitting; the
    report's notes name them.

    text is cut into num_samples windows of seq_len tokens, fewer where it ends before. Each window runs through
    all variants in turn, so memory holds all quantized forms of the layers at once. Raises a TurboQuantError that
    says what to change.
    """
    source = resolve(ref, revision=revision, progress=progress)
    if not is_converted(source.config):
        recipes = float_recipes(bits, group_size, affine, qjl)
        return compare_recipes(source, recipes, text, seq_len=seq_len, num_samples=num_samples, progress=progress)
    cut = windows(load_tokenizer(source), text, seq_len, num_samples)
    origin = None if reference is None else resolve(reference, progress=progress)
    return _report(source.name, text, cut, *_of_converted(source, origin, affine, cut, progress))


def compare_recipes(
    source: Source,
    recipes: Sequence[Recipe],
    text: Text,
    *,
    seq_len: int = 512,
    num_samples: int = 32,
    progress: Progress = silent,
) -> EvaluationReport:
    """As `evaluate`, of a float model in full precision and quantized by each of `recipes`.

    All quantize the layers that the first one does.
    """
    cut = windows(load_tokenizer(source), text, seq_len, num_samples)
    config = recipes[0].config if recipes else QuantConfig()
    return _report(source.name, text, cut, *_of_float(source, config, recipes, cut, progress))


def float_recipes(bits: Sequence[int], group_size: int, affine: bool, qjl: bool) -> list[Recipe]:
    """The recipes of a float model's rows, in their order; raises RecipeError for what does not exist."""
    wanted: list[tuple[Method, bool]] = [("affine", affine), ("turboquant", True), ("turboquant+qjl", qjl)]
    methods: list[Method] = [method for method, included in wanted if included]
    if affine and group_size not in (32, 64, 128):
        raise RecipeError(
            f"affine quantization has no group size {group_size}; choose 32, 64 or 128, or turn affine off"
        )
    configs = [QuantConfig(bits=b, group_size=group_size) for b in dict.fromkeys(bits)]
    return [Recipe(method, config) for config in configs for method in methods]


def _of_float(
    source: Source,
    config: QuantConfig,
    recipes: Sequence[Recipe],
    cut: NDArray[np.int32],
    progress: Progress,
    others: int = 0,
) -> tuple[list[Variant], Steps, list[str]]:
    """The float model and what each recipe makes of the layers that `config` quantizes, and notes.

    The steps have room for the windows of `others` more.
    """
    model = load_source(source, fuse=False, dequantize=True)
    check_context(model, cut.shape[1], "a window of seq_len", "choose a shorter seq_len")
    policy = Policy(config, str(source.config["model_type"]), adapter.layer_count(model))
    full = FloatModel(model, _float_bytes(source), policy)
    steps = Steps(progress, len(recipes) * len(full) + (1 + len(recipes) + others) * len(cut))
    made = [full.quantized(r, lambda label=r.label: steps.add(f"quantizing: {label}")) for r in recipes]
    return [full.variant(), *made], steps, _kept(full.unfitting)


def _kept(unfitting: Mapping[str, str]) -> list[str]:
    """A note for each reason why layers were kept."""
    return [
        f"every row keeps {count} layers as they came, as keep_unfitting does in a conversion: {reason}"
        for reason, count in Counter(unfitting.values()).items()
    ]


def _float_bytes(source: Source) -> int:
    """Bytes of a model in full precision: those of its files, or of its weights where the files hold them quantized."""
    if Packing.of(source.config) is None:
        return source.size_bytes
    found = parameters_of(source.config, source.tensors, QuantConfig())
    return sum(TensorSpec(one.name, one.dtype, one.shape).nbytes for one in found.values())


def _of_converted(
    source: Source, origin: Source | None, affine: bool, cut: NDArray[np.int32], progress: Progress
) -> tuple[list[Variant], Steps, list[str]]:
    model = load_source(source, fuse=False)
    check_context(model, cut.shape[1], "a window of seq_len", "choose a shorter seq_len")
    own, recipe = converted(model, source)
    if origin is None:
        return [own], Steps(progress, len(cut)), []
    if is_converted(origin.config):
        raise InputError(f"the reference {origin.name!r} is converted itself; give the float model it was made from")
    recipes = [Recipe("affine", recipe)] if affine and recipe.group_size else []
    variants, steps, notes = _of_float(origin, recipe, recipes, cut, progress, others=1)
    if affine and not recipe.group_size:
        notes.append("no affine row: MLX's affine quantization has no groups of one scale a row, as this model has")
    return [*variants, own], steps, notes


def _run(
    variants: list[Variant], cut: NDArray[np.int32], steps: Steps
) -> tuple[list[list[Score]], list[tuple[str, str]]]:
    """Scores of each variant on each window, and the (backend, kernel path) that each ran on."""
    scores: list[list[Score]] = [[] for _ in variants]
    paths = [("", "")] * len(variants)
    for number, window in enumerate(cut, 1):
        tokens, targets = mx.array(window[:-1]), window[1:]
        expected: NDArray[np.float32] | None = None
        for i, variant in enumerate(variants):
            metal_kernels.reset_paths()
            logits = logits_array(variant.logits(tokens))
            paths[i] = (metal_kernels.active_backend(), metal_kernels.kernel_path())
            if variant.method == "float":
                expected = logits
            scores[i].append(score(logits, targets, expected))
            steps.add(f"window {number} of {len(cut)}: {variant.label}")
    return scores, paths


def _report(
    model: str,
    text: Text,
    cut: NDArray[np.int32],
    variants: list[Variant],
    steps: Steps,
    notes: Sequence[str],
) -> EvaluationReport:
    scores, paths = _run(variants, cut, steps)
    count, length = cut.shape
    rows = tuple(_row(*measured) for measured in zip(variants, scores, paths, strict=True))
    has_float = variants[0].method == "float"
    differences = tuple(difference(s, scores[0]) if has_float else None for s in scores)
    tokens = count * (length - 1)
    return EvaluationReport(model, text.name, text.sha256, length, count, tokens, rows, differences, tuple(notes))


def _row(variant: Variant, scores: list[Score], path: tuple[str, str]) -> EvaluationRow:
    estimate = perplexity(scores)
    positions = sum(s.positions for s in scores)
    kl = [s.kl for s in scores if s.kl is not None]
    top1 = [s.top1 for s in scores if s.top1 is not None]
    return EvaluationRow(
        method=variant.method,
        bits=variant.bits,
        group_size=variant.group_size,
        bits_per_weight=variant.bits_per_weight,
        size_bytes=variant.size_bytes,
        ppl=estimate.value,
        ppl_stderr=estimate.stderr,
        kl=sum(kl) / positions if kl else None,
        top1=sum(top1) / positions if top1 else None,
        backend=path[0],
        kernel_path=path[1],
    )
