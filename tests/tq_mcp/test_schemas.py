"""The answers hold what the engine and the registry measure, so that nothing is lost on the way."""

from dataclasses import fields
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from quant_engine.compare import CacheReport, CacheRow
from quant_engine.evaluate import EvaluationRow
from quant_engine.generate import GenerationResult
from quant_engine.plan import Plan, PlanCache, PlanRow
from registry import CacheComparisonRecord, EvaluationRecord, FileRecord, SpeedRecord
from tq_mcp import schemas


def names(kind: Any) -> set[str]:
    return set(kind.model_fields) if issubclass(kind, BaseModel) else {field.name for field in fields(kind)}


@pytest.mark.parametrize(
    ("answer", "measured", "left_out"),
    [
        (schemas.EvaluationRow, EvaluationRow, set()),
        (schemas.CacheRow, CacheRow, set()),
        (schemas.CacheComparison, CacheReport, set()),
        (schemas.Plan, Plan, set()),
        (schemas.PlanRow, PlanRow, set()),
        (schemas.PlanCache, PlanCache, set()),
        (schemas.Generation, GenerationResult, {"token_ids"}),
        (schemas.ModelFile, FileRecord, set()),
        (schemas.EvaluationEntry, EvaluationRecord, set()),
        (schemas.SpeedEntry, SpeedRecord, {"context_tokens"}),
        (schemas.CacheEntry, CacheComparisonRecord, {"group_size", "prompt_sha256", "text"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_answer_has_every_figure(answer: Any, measured: Any, left_out: set[str]) -> None:
    assert names(measured) - names(answer) == left_out


def test_an_evaluation_has_exactly_the_promised_fields() -> None:
    promised = {"model", "text", "seq_len", "num_samples", "tokens", "rows"}
    assert set(schemas.Evaluation.model_fields) - {"notes"} == promised
    assert set(schemas.TextUsed.model_fields) == {"name", "sha256"}
    assert list(schemas.EvaluationRow.model_fields) == [
        "method", "bits", "group_size", "bits_per_weight", "size_bytes", "ppl", "ppl_stderr", "kl", "top1", "backend",
        "kernel_path",
    ]  # fmt: skip


def test_an_unknown_field_is_an_error() -> None:
    with pytest.raises(ValidationError):
        schemas.TextUsed.model_validate({"name": "x", "sha256": "y", "other": 1})
