"""What is said of quality in the documents holds in the measured table."""

import json
from pathlib import Path
from typing import Any

import pytest

RESULT = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "quality.json"


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return json.loads(RESULT.read_text())["report"]["rows"]


def row(rows: list[dict[str, Any]], method: str, bits: int, **extra: Any) -> dict[str, Any]:
    (found,) = [
        r
        for r in rows
        if (r["method"], r["bits"]) == (method, bits) and {k: r[k] for k in ("scale", "target_bpw") if k in r} == extra
    ]
    return found


@pytest.mark.parametrize(("bits", "cost"), [(4, 0.018), (3, 0.09), (2, 0.66)])
def test_a_width_costs_no_more_than_is_said(rows: list[dict[str, Any]], bits: int, cost: float) -> None:
    assert row(rows, "turboquant", bits)["cost"] <= cost


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_searched_scales_beat_affine_at_a_quarter_bit_more_and_rms_scales(
    rows: list[dict[str, Any]], bits: int
) -> None:
    ours, affine = row(rows, "turboquant", bits), row(rows, "affine", bits)
    rms = row(rows, "turboquant", bits, scale="rms")
    assert affine["bits_per_weight"] == ours["bits_per_weight"] + 0.25
    assert rms["bits_per_weight"] == ours["bits_per_weight"]
    for other in (affine, rms):
        assert ours["ppl"] < other["ppl"] and ours["kl"] < other["kl"]


def test_bits_that_are_shared_out_beat_one_width_at_no_more_bits(rows: list[dict[str, Any]]) -> None:
    shared = {r["target_bpw"]: r for r in rows if "target_bpw" in r}
    assert set(shared) == {4.0, 3.25, 3.0, 2.5}
    assert all(r["bits_per_weight"] <= target for target, r in shared.items())
    assert shared[3.25]["ppl"] < row(rows, "turboquant", 3)["ppl"] - 0.2
    assert shared[3.0]["ppl"] < row(rows, "affine", 3)["ppl"]
    assert shared[2.5]["ppl"] < row(rows, "affine", 2)["ppl"]
