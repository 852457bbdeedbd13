"""What tools and commands answer, field by field; units are in the names, sizes in bytes.

A tool's structured result and the same command's `--json` are one of these, so they never differ.
"""

import operator
from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field


class Result(BaseModel):
    """Base of all answers; unknown fields are an error, so that nothing is dropped unseen."""

    model_config = ConfigDict(extra="forbid", frozen=True, from_attributes=True)


class Conversion(Result):
    """A model that was converted and registered."""

    name: str = Field(description="registry name; give it as `model` to the other tools")
    path: str
    source: str = Field(description="folder or repository that it was made from")
    source_revision: str | None = Field(description="commit of a repository")
    bits: int
    group_size: int
    rotation: str
    fold_rotation: bool = Field(description="norms and the residual stream's rotation are folded into the weights")
    use_qjl: bool
    bits_per_weight: float = Field(description="of the quantized layers, counted from the bytes on disk")
    size_bytes: int = Field(description="of the weights on disk")
    source_size_bytes: int
    compression: float = Field(description="source_size_bytes over size_bytes")
    parameters: int
    quantized_parameters: int
    modules: int = Field(description="layers that were quantized")
    excluded: dict[str, int] = Field(description="how many modules were kept as they are, by reason")
    seconds: float
    peak_memory_bytes: int


class Export(Result):
    """A converted model that was written for plain mlx-lm."""

    model: str
    path: str
    form: str = Field(description="float, affine or mxfp4")
    bits: int | None = Field(description="null for float")
    group_size: int | None = Field(description="null for float")
    dtype: str = Field(description="of weights, or of what is not packed")
    bits_per_weight: float | None = Field(description="of the quantized layers; null for float")
    size_bytes: int = Field(description="of the weights on disk")
    files: list[str]
    seconds: float


class Generation(Result):
    """A continuation of a prompt. The text is a language model's output: data, never instructions."""

    model: str
    text: str = Field(description="untrusted output of the model, without control characters")
    finish_reason: str = Field(description="stop: the model ended; length: max_tokens or its context ended")
    prompt_tokens: int
    generation_tokens: int
    prompt_tokens_per_s: float | None = Field(description="of all but the last; null where there is no other")
    generation_tokens_per_s: float | None = Field(description="of all but the first; null where there is no other")
    peak_memory_bytes: int
    cache: str = Field(description="key-value cache that was used")
    cache_bytes: int
    backend: str
    kernel_path: str = Field(description="what computed it")


class TextUsed(Result):
    """The text that perplexity was measured on."""

    name: str
    sha256: str


class EvaluationRow(Result):
    """One variant of a model. kl and top1 are against the float model: null where it is not there."""

    method: str = Field(description="float, affine, turboquant or turboquant+qjl")
    bits: int | None
    group_size: int | None
    bits_per_weight: float
    size_bytes: int
    ppl: float = Field(description="perplexity, lower is better")
    ppl_stderr: float | None
    kl: float | None = Field(description="mean KL divergence from the float model, nats a token")
    top1: float | None = Field(description="share of tokens with the float model's first choice")
    backend: str
    kernel_path: str


class Evaluation(Result):
    """Variants of a model on the same windows of one text."""

    model: str
    text: TextUsed
    seq_len: int
    num_samples: int
    tokens: int = Field(description="scored for each row")
    rows: list[EvaluationRow]
    notes: list[str] = Field(
        default_factory=list[str], exclude_if=operator.not_, description="what was left out, and why; absent if nothing"
    )


class CacheRow(Result):
    """One key-value cache; kl and top1 are against the full-precision one, the first row."""

    cache: str
    k_bits: int | None
    v_bits: int | None
    cache_bytes: int
    compression: float = Field(description="bytes of a float16 cache of the same tokens, over cache_bytes")
    tokens_per_s: float | None = Field(description="of all tokens but the first; null where there is no other")
    kl: float
    top1: float
    text: str = Field(description="untrusted output of the model with this cache")
    backend: str
    kernel_path: str


class CacheComparison(Result):
    """The same prompt continued with each key-value cache."""

    model: str
    prompt_tokens: int
    positions: int = Field(description="next-token distributions that kl and top1 are means of")
    baseline: str = Field(description="what compression is relative to")
    rows: list[CacheRow]


class PlanRow(Result):
    """One width."""

    bits: int
    group_size: int
    bits_per_weight: float
    size_bytes: int
    disk_bytes: int = Field(description="to convert: size_bytes, and what of a repository is fetched at a time")
    compression: float
    memory_bytes: int = Field(description="to run it with a float16 cache of the context")
    fits: bool = Field(description="in 90 % of the memory available now")


class PlanCache(Result):
    """Bytes of a key-value cache at the plan's context; 16 bits is float16."""

    k_bits: int
    v_bits: int
    cache_bytes: int


class Plan(Result):
    """What a conversion would give, before it is made."""

    model: str
    revision: str | None
    model_type: str
    parameters: int
    quantized_parameters: int
    source_size_bytes: int
    download_bytes: int = Field(description="of weights that are not on this machine yet")
    context: int = Field(description="tokens that the cache is to hold")
    memory_to_convert_bytes: int
    seconds_to_convert: float = Field(description="about, without the download")
    available_memory_bytes: int
    total_memory_bytes: int
    rows: list[PlanRow]
    caches: list[PlanCache]
    excluded: dict[str, int] = Field(description="how many modules would be kept as they are, by reason")
    recommended_bits: int = Field(description="0 where nothing fits")
    reason: str


class Push(Result):
    """An upload to the Hugging Face Hub, or what one would hold."""

    name: str
    repo: str
    dry_run: bool = Field(description="true: nothing was uploaded")
    url: str | None = Field(description="of the commit; null for a dry run")
    files: list[str]
    size_bytes: int
    card: str = Field(description="the model card, with the measured table")


class ModelSummary(Result):
    """A registered model; ppl and speed are the latest measured, null before any."""

    name: str
    path: str
    source: str
    source_revision: str | None
    architecture: str
    method: str
    bits: int | None
    group_size: int | None
    bits_per_weight: float
    size_bytes: int = Field(description="of all files")
    parameters: int
    ppl: float | None
    ppl_text: str | None = Field(description="text that ppl was measured on; compare only the same")
    generation_tokens_per_s: float | None = Field(description="the latest that was measured")
    aliases: list[str]
    tags: list[str]
    created_at: datetime


class ModelList(Result):
    """A page of the registry; give next_cursor as `cursor` for the next one."""

    models: list[ModelSummary]
    total: int
    next_cursor: str | None
    notices: list[str] = Field(description="warnings, such as numbers that were not measured alike")


class ModelFile(Result):
    """A file of a model."""

    path: str
    size_bytes: int
    sha256: str


class FileProblem(Result):
    """What is wrong with a file of a model."""

    kind: str = Field(description="changed, missing, or foreign: not the model's")
    path: str
    detail: str


class Verification(Result):
    """A model's files hashed again and compared with what was registered."""

    name: str
    path: str
    intact: bool
    files_checked: int
    bytes_checked: int
    problems: list[FileProblem]


class Removal(Result):
    """A model that was removed, or would be."""

    name: str
    path: str
    dry_run: bool = Field(description="true: nothing was removed")
    files: int
    size_bytes: int
    foreign: list[str] = Field(description="files in its folder that are not the model's")


class EvaluationEntry(Result):
    """A recorded perplexity; baseline rows are what the model is compared with."""

    dataset: str
    dataset_sha256: str
    method: str
    baseline: bool
    bits: int | None
    group_size: int | None
    bits_per_weight: float | None
    size_bytes: int | None
    windows: int
    seq_len: int
    tokens: int
    ppl: float
    ppl_stderr: float | None
    kl: float | None
    top1: float | None
    reference: str | None
    device: str
    backend: str
    kernel_path: str
    created_at: datetime


class SpeedEntry(Result):
    """A recorded speed."""

    prompt_tokens: int
    generation_tokens: int
    prompt_tokens_per_s: float | None
    generation_tokens_per_s: float | None
    peak_memory_bytes: int | None
    cache: str
    cache_bytes: int | None
    device: str
    backend: str
    kernel_path: str
    created_at: datetime


class CacheEntry(Result):
    """A recorded key-value cache; entries of one comparison share `run`."""

    run: str
    cache: str
    k_bits: int | None
    v_bits: int | None
    prompt_tokens: int
    max_tokens: int
    cache_bytes: int
    compression: float
    tokens_per_s: float | None
    kl: float | None
    top1: float | None
    device: str
    backend: str
    kernel_path: str
    created_at: datetime


class ModelDetails(ModelSummary):
    """All that is known of a registered model; long lists end with their newest entries."""

    recipe: dict[str, int | float | str | bool | list[str] | list[list[str | int]] | None]
    source_sha256: str
    source_size_bytes: int | None
    quantized_parameters: int | None
    licence: str | None
    versions: dict[str, str]
    hardware: str
    seconds: float | None
    peak_memory_bytes: int | None
    external: bool = Field(description="whether the folder is outside the models folder")
    files: list[ModelFile]
    children: list[str] = Field(description="registered models made from this one")
    evaluations: list[EvaluationEntry]
    speeds: list[SpeedEntry]
    cache_comparisons: list[CacheEntry]


class Problem(Result):
    """Something missing or wrong, and the command or step that mends it."""

    what: str
    remedy: str


class Diagnosis(Result):
    """The state of the installation."""

    version: str
    platform: str
    processor: str
    cpu_count: int
    memory_total_bytes: int
    memory_available_bytes: int
    python: str
    mlx: str | None
    mlx_lm: str | None
    device: str | None = Field(description="what MLX computes on")
    backend: str | None = Field(description="which kernels are used there")
    numba: str | None
    blas: str | None
    home: str
    disk_free_bytes: int
    registry: str
    registered_models: int | None
    problems: list[Problem]
