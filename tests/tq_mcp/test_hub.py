"""Uploads: what would go, the card's table, and the Hub's refusals in words; no network."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import LocalTokenNotFoundError

from quant_engine.errors import InputError, SourceError
from registry import EvaluationRecord
from tq_mcp import hub

ROW = EvaluationRecord(
    dataset="prose", dataset_sha256="aa", method="turboquant", ppl=12.345, windows=8, seq_len=256, tokens=2040,
    ppl_stderr=0.5, kl=0.0123, top1=0.91, bits=3, group_size=64, bits_per_weight=3.25, size_bytes=1,
)  # fmt: skip
CARD = "---\nlicense: mit\n---\n\n# small\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    for name in ("README.md", "config.json", "model.safetensors", "extra/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


class Hub:
    """Stands in for the Hub's client and notes what it is told."""

    def __init__(self, refusal: Exception | None = None) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.refusal = refusal

    def create_repo(self, repo: str, **options: Any) -> None:
        if self.refusal:
            raise self.refusal
        self.calls.append((repo, options))

    def create_commit(self, repo: str, operations: list[Any], **_: Any) -> Any:
        self.calls.append((repo, {o.path_in_repo: o.path_or_fileobj for o in operations}))
        return SimpleNamespace(commit_url=f"https://example.test/{repo}")


def test_the_card_gains_a_table_of_the_newest_measurements() -> None:
    older = EvaluationRecord(**{**vars(ROW), "ppl": 99.0})
    card = hub.card_with_measurements(CARD, [older, ROW])
    assert "| prose | 8 × 256 | turboquant | 3.25 | 12.35 ± 0.50 | 0.0123 | 91.0% |" in card
    assert "99.00" not in card
    assert card.startswith(CARD.rstrip())
    assert hub.card_with_measurements(card, [ROW]) == card


def test_a_card_without_measurements_stays_as_it_is() -> None:
    assert hub.card_with_measurements(CARD, []) == CARD


def test_one_commit_holds_all_files_and_the_new_card(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Hub()
    monkeypatch.setattr(hub, "HfApi", lambda: fake)
    assert hub.upload(model, ["config.json", "model.safetensors"], "new card", "owner/name", private=True).endswith(
        "owner/name"
    )
    (_, options), (_, sent) = fake.calls
    assert options == {"private": True, "exist_ok": True}
    assert set(sent) == {"README.md", "config.json", "model.safetensors"}
    assert sent["README.md"] == b"new card"


@pytest.mark.parametrize(
    ("refusal", "words"),
    [(LocalTokenNotFoundError("none"), "hf auth login"), (ConnectionError("down"), "stopped: down; run it again")],
)
def test_refusals_are_told_in_words(
    model: Path, monkeypatch: pytest.MonkeyPatch, refusal: Exception, words: str
) -> None:
    monkeypatch.setattr(hub, "HfApi", lambda: Hub(refusal))
    with pytest.raises(SourceError, match=words):
        hub.upload(model, ["config.json"], "card", "owner/name", private=False)


@pytest.mark.parametrize("repo", ["name", "a/b/c", "owner/na me", "-x/.."])
def test_names_that_are_none_are_refused(repo: str) -> None:
    with pytest.raises(InputError, match="is no repository name"):
        hub.check_repo(repo)
