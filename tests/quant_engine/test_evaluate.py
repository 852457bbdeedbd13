"""Evaluation on real trained models: agreement with transformers, order, sizes, and what is refused."""

import math
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from quant_engine.config import QuantConfig
from quant_engine.convert import convert
from quant_engine.errors import InputError, RecipeError
from quant_engine.evaluate import EvaluationReport, evaluate, float_recipes
from quant_engine.export import export
from quant_engine.loader import load_source
from quant_engine.progress import Progress, silent
from quant_engine.source import resolve
from quant_engine.text import Text, load_text
from tests.quant_engine.checkpoints import write_model

WINDOWS = {"seq_len": 96, "num_samples": 3}

# transformers 5.23, torch 2.13, float32: windows of 512, the first 4.
TRANSFORMERS = {"enwiki_dev.txt": 21.781688, "wikitext2_valid.txt": 44.122334}


@pytest.fixture(scope="module")
def text() -> Text:
    return load_text()


@pytest.fixture(scope="module")
def report(demo_model: Path, text: Text) -> EvaluationReport:
    return evaluate(demo_model, bits=(4, 2), text=text, **WINDOWS)


@pytest.fixture(scope="module")
def converted(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "model"
    convert(demo_model, folder, config=QuantConfig(bits=2))
    return folder


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_perplexity_agrees_with_transformers(name: str, shared_data: Path, shared_models: Path) -> None:
    beginning = load_text(shared_data / name).text[:20_000]
    measured = evaluate(
        shared_models / "wiki-qwen2-29m", bits=(), text=Text.of(name, beginning), seq_len=512, num_samples=4
    )
    assert measured.rows[0].ppl == pytest.approx(TRANSFORMERS[name], rel=1e-3)
    assert measured.tokens == 4 * 511


def test_perplexity_agrees_with_transformers_run_now(demo_model: Path, text: Text, report: EvaluationReport) -> None:
    torch: Any = pytest.importorskip("torch")
    transformers: Any = pytest.importorskip("transformers")
    tokens = transformers.AutoTokenizer.from_pretrained(demo_model).encode(text.text, add_special_tokens=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    windows = torch.tensor(tokens[: 3 * 96]).reshape(3, 96)
    with torch.no_grad():
        logits = model(windows).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert report.rows[0].ppl == pytest.approx(math.exp(loss.item()), rel=1e-3)


def test_rows_are_float_then_each_width_in_the_order_asked(report: EvaluationReport) -> None:
    assert [(row.method, row.bits) for row in report.rows] == [
        ("float", None),
        ("affine", 4), ("turboquant", 4), ("turboquant+qjl", 4),
        ("affine", 2), ("turboquant", 2), ("turboquant+qjl", 2),
    ]  # fmt: skip


def test_the_float_row_is_the_measure_of_the_others(report: EvaluationReport) -> None:
    full = report.rows[0]
    assert (full.kl, full.top1, full.group_size, full.bits_per_weight) == (0.0, 1.0, None, 16.0)
    assert report.differences[0] is not None and report.differences[0].value == 0.0


def test_quantizing_costs_more_at_fewer_bits_and_less_than_affine_does(report: EvaluationReport) -> None:
    kl = {(row.method, row.bits): row.kl or 0.0 for row in report.rows}
    assert 0 < kl["turboquant", 4] < kl["turboquant", 2] / 5
    assert kl["turboquant", 2] < kl["affine", 2]
    top1 = {(row.method, row.bits): row.top1 or 0.0 for row in report.rows}
    assert 0.5 < top1["turboquant", 4] < 1
    assert top1["turboquant", 2] < top1["turboquant", 4]


def test_differences_are_of_the_rows_and_pairing_makes_them_sharper(report: EvaluationReport) -> None:
    for row, paired in zip(report.rows, report.differences, strict=True):
        assert paired is not None
        assert paired.value == pytest.approx(row.ppl - report.rows[0].ppl)
    four_bits, paired = report.rows[2], report.differences[2]
    assert paired is not None and (paired.stderr or 0) < (four_bits.ppl_stderr or 0) / 3


def test_bits_of_a_weight_come_from_bytes(report: EvaluationReport) -> None:
    bits = {(row.method, row.bits): row.bits_per_weight for row in report.rows}
    assert (bits["affine", 4], bits["turboquant", 4]) == (4.5, 4.25)
    assert (bits["affine", 2], bits["turboquant", 2]) == (2.5, 2.25)
    assert 3.25 < bits["turboquant+qjl", 2] < 3.35


def test_every_row_says_what_ran(report: EvaluationReport) -> None:
    assert all(row.backend in row.kernel_path for row in report.rows)
    assert "affine" in report.rows[1].kernel_path
    assert "affine" not in report.rows[2].kernel_path


def test_the_report_as_json_has_the_documented_fields(report: EvaluationReport, text: Text) -> None:
    values = report.to_dict()
    assert set(values) == {"model", "text", "seq_len", "num_samples", "tokens", "rows"}
    assert values["text"] == {"name": text.name, "sha256": text.sha256}
    assert (values["seq_len"], values["num_samples"], values["tokens"]) == (96, 3, 3 * 95)
    assert list(values["rows"][0]) == [
        "method", "bits", "group_size", "bits_per_weight", "size_bytes", "ppl", "ppl_stderr", "kl", "top1",
        "backend", "kernel_path",
    ]  # fmt: skip


def test_a_converted_model_alone_has_nothing_to_be_compared_with(
    converted: Path, text: Text, report: EvaluationReport
) -> None:
    alone = evaluate(converted, text=text, **WINDOWS)
    (row,) = alone.rows
    assert (row.method, row.bits, row.kl, row.top1, alone.differences) == ("turboquant", 2, None, None, (None,))
    assert row.ppl == pytest.approx(report.rows[5].ppl, rel=1e-4)
    assert row.bits_per_weight == 2.25


def test_a_converted_model_is_compared_with_the_model_it_was_made_from(
    converted: Path, demo_model: Path, text: Text, report: EvaluationReport
) -> None:
    compared = evaluate(converted, text=text, reference=demo_model, **WINDOWS)
    assert [(row.method, row.bits) for row in compared.rows] == [("float", None), ("affine", 2), ("turboquant", 2)]
    assert compared.rows[2].kl == pytest.approx(report.rows[5].kl, rel=1e-3)
    assert compared.rows[2].size_bytes == pytest.approx(report.rows[5].size_bytes, rel=0.01)


def test_a_converted_model_is_no_reference(converted: Path, text: Text) -> None:
    with pytest.raises(InputError, match="converted itself"):
        evaluate(converted, text=text, reference=converted, **WINDOWS)


@pytest.mark.parametrize(("form", "bits"), [("affine", 8), ("mxfp4", 4)])
def test_a_model_that_mlx_quantized_is_measured_as_what_it_stands_for(
    demo_model: Path, text: Text, tmp_path: Path, form: str, bits: int
) -> None:
    convert(demo_model, tmp_path / "ours", config=QuantConfig(bits=4, group_size=32))
    export(tmp_path / "ours", tmp_path / form, form=form, bits=bits)
    source, tokens = resolve(tmp_path / form), mx.array([list(range(60, 90))])
    as_it_runs, full = (load_source(source, fuse=False, dequantize=wanted)(tokens) for wanted in (False, True))
    assert mx.abs(full - as_it_runs).max() < 0.03 * mx.abs(as_it_runs).max()
    measured = evaluate(tmp_path / form, bits=(3,), qjl=False, text=text, **WINDOWS)
    full, affine, ours = measured.rows
    assert full.bits_per_weight == 16
    assert affine.bits_per_weight == ours.bits_per_weight + 0.25 == 3.5
    assert full.size_bytes > 3 * ours.size_bytes


def test_progress_counts_up_to_all(demo_model: Path, text: Text) -> None:
    seen: list[tuple[int, int, str]] = []
    evaluate(demo_model, bits=(2,), text=text, seq_len=16, num_samples=2, qjl=False, progress=lambda *s: seen.append(s))
    counted = [entry for entry in seen if entry[2].startswith(("quantizing", "window"))]
    assert [done for done, _, _ in counted] == list(range(1, counted[0][1] + 1))
    assert counted[-1][2] == "window 2 of 2: turboquant, 2 bits"


def test_progress_of_a_converted_model_beside_its_original_counts_up_to_all(
    converted: Path, demo_model: Path, text: Text
) -> None:
    seen: list[tuple[int, int, str]] = []
    small: dict[str, Any] = {"seq_len": 16, "num_samples": 2}
    evaluate(converted, text=text, reference=demo_model, progress=lambda *s: seen.append(s), **small)
    counted = [entry for entry in seen if entry[2].startswith(("quantizing", "window"))]
    assert [(done, total) for done, total, _ in counted] == [(n, len(counted)) for n in range(1, len(counted) + 1)]
    assert counted[-1][2] == "window 2 of 2: turboquant, 2 bits"


def test_an_exception_from_progress_stops_the_work(demo_model: Path, text: Text) -> None:
    calls: list[str] = []

    def stop(done: int, total: int, message: str) -> None:
        calls.append(message)
        if message.startswith("window"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(demo_model, bits=(), text=text, seq_len=16, num_samples=5, progress=stop)
    assert sum(message.startswith("window") for message in calls) == 1


def refused(ref: Path, text: Text, progress: Progress = silent, **options: Any) -> None:
    evaluate(ref, text=text, progress=progress, **{"bits": (2,), "num_samples": 1, **options})


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"seq_len": 1025}, InputError, "1025 tokens and the model reads at most 1024; choose a shorter"),
        ({"bits": (5,)}, RecipeError, "bits is 5"),
        ({"group_size": 48}, RecipeError, "48"),
        ({"seq_len": 10**7}, InputError, "needs 10000000"),
    ],
    ids=["longer than the context", "bits", "groups", "longer than the text"],
)
def test_what_cannot_be_measured_is_refused(
    demo_model: Path, text: Text, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        refused(demo_model, text, **options)


def test_one_scale_a_row_has_no_affine_counterpart() -> None:
    with pytest.raises(RecipeError, match="no group size 0; choose 32, 64 or 128, or turn affine off"):
        float_recipes((3,), 0, affine=True, qjl=False)
    assert [r.method for r in float_recipes((3, 3), 0, affine=False, qjl=False)] == ["turboquant"]


WORDS = Text.of("letters", "abcdefgh" * 40)


@pytest.fixture
def unfitting(tmp_path: Path, demo_model: Path) -> Path:
    """A float model whose down projections no group size fits."""
    folder = write_model(tmp_path / "in", intermediate_size=172, vocab_size=4096)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo_model / name, folder / name)
    return folder


def test_layers_that_do_not_fit_are_kept_in_every_row_and_a_note_says_so(unfitting: Path, tmp_path: Path) -> None:
    small: dict[str, Any] = {"text": WORDS, "seq_len": 16, "num_samples": 1}
    measured = evaluate(unfitting, bits=(4,), qjl=False, **small)
    assert [row.method for row in measured.rows] == ["float", "affine", "turboquant"]
    assert measured.notes == (
        "every row keeps 2 layers as they came, as keep_unfitting does in a conversion: a width of 172 is not a "
        "multiple of 32, so no group size fits",
    )
    convert(unfitting, tmp_path / "out", config=QuantConfig(bits=4), keep_unfitting=True)
    compared = evaluate(tmp_path / "out", reference=unfitting, **small)
    assert [row.method for row in compared.rows] == ["float", "affine", "turboquant"]
    assert compared.notes == measured.notes
    assert compared.rows[2].ppl == pytest.approx(measured.rows[2].ppl, rel=1e-3)


def test_a_model_of_one_scale_a_row_has_no_affine_row_and_a_note_says_so(demo_model: Path, tmp_path: Path) -> None:
    convert(demo_model, tmp_path / "out", config=QuantConfig(bits=4, group_size=0))
    compared = evaluate(tmp_path / "out", reference=demo_model, text=WORDS, seq_len=16, num_samples=1)
    assert [row.method for row in compared.rows] == ["float", "turboquant"]
    assert len(compared.notes) == 1 and "no affine row: MLX's affine quantization" in compared.notes[0]
