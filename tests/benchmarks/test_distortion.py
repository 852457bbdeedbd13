from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from benchmarks import distortion
from benchmarks.distortion import BITS, PAPER_BOUND, REAL, measure, unit_vectors


def _gaussian() -> mx.array:
    return unit_vectors(np.random.default_rng(1).standard_normal((1000, 1024)))


@pytest.mark.parametrize("bits", BITS)
def test_gaussian_vectors_lose_the_exact_distortion_within_one_percent(bits: int) -> None:
    row = measure("gaussian", _gaussian(), bits, "auto")
    assert row["paper"] == pytest.approx(row["exact"], rel=0.01)
    assert row["group 64"] < row["paper"]
    assert row["with QJL"] < row["bound"]


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("bits", BITS)
def test_rotated_real_vectors_lose_no_more_than_gaussian_ones(shared_data: Path, name: str, bits: int) -> None:
    x = unit_vectors(np.load(shared_data / "vectors" / f"{name}.npy"))
    rotated, plain = (measure(name, x, bits, rotation) for rotation in ("auto", "none"))
    assert rotated["paper"] < 1.01 * rotated["exact"]
    assert rotated["paper"] < plain["paper"]
    assert rotated["with QJL"] < PAPER_BOUND[bits]
    assert rotated["with QJL"] < 1.1 * plain["with QJL"]


def test_vectors_are_scaled_to_one_and_padded_to_whole_words() -> None:
    x = unit_vectors(np.ones((3, 300)))
    assert x.shape == (3, 320)
    np.testing.assert_allclose(np.square(np.array(x)).sum(1), 1, rtol=1e-6)


def test_absent_vector_sets_are_skipped_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(distortion, "SHARED", tmp_path)
    assert list(distortion.sets()) == ["gaussian"]
    assert "skipped bge_m3_1000x1024" in capsys.readouterr().out


def test_the_report_has_every_set_rotation_and_width(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, Any]] = []
    monkeypatch.setattr(distortion, "sets", lambda: {"gaussian": _gaussian()[:50]})
    monkeypatch.setattr(distortion, "report", lambda name, command, rows: shown.extend(rows))
    distortion.main()
    assert [(row["rotation"], row["bits"]) for row in shown] == [(r, b) for r in ("auto", "none") for b in BITS]
