from pathlib import Path

import pytest

from quant_engine import journal
from quant_engine.file_hash import file_sha256
from quant_engine.journal import JOURNAL, Journal, OutputFile


def write(folder: Path, *names: str) -> Journal:
    made = Journal(folder)
    for name in names:
        (folder / name).write_text(name)
        made.add(name, file_sha256(folder / name))
    return made


def test_files_noted_are_found_again_and_all_else_is_deleted(tmp_path: Path) -> None:
    write(tmp_path, "a", "b")
    (tmp_path / "half").write_text("h")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_text("x")
    assert Journal(tmp_path).finished == {name: OutputFile.of(tmp_path, name) for name in "ab"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [JOURNAL, "a", "b"]


def test_one_folder_may_be_spared(tmp_path: Path) -> None:
    for name in ("deep", "spared"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    Journal(tmp_path, spare="spared")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["spared", "spared/file"]


def test_a_file_noted_twice_is_as_it_was_noted_last(tmp_path: Path) -> None:
    write(tmp_path, "a")
    (tmp_path / "a").write_text("new")
    again = Journal(tmp_path)
    assert again.finished == {}
    (tmp_path / "a").write_text("newer")
    again.add("a", file_sha256(tmp_path / "a"))
    assert Journal(tmp_path).finished["a"].size_bytes == 5


def test_a_line_cut_off_spoils_none_after_it(tmp_path: Path) -> None:
    write(tmp_path, "a", "b")
    whole = (tmp_path / JOURNAL).read_bytes()
    (tmp_path / JOURNAL).write_bytes(whole[:-9])
    write(tmp_path, "c")
    assert set(Journal(tmp_path).finished) == {"a", "c"}


def test_closing_tells_of_every_file_reads_none_twice_and_removes_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = write(tmp_path, "b")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_text("another b")
    expected = [OutputFile.of(tmp_path, "a/b"), OutputFile.of(tmp_path, "b")]
    read: list[Path] = []
    hashed = journal.file_sha256
    monkeypatch.setattr(journal, "file_sha256", lambda path: read.append(path) or hashed(path))
    assert made.close() == expected
    assert read == [tmp_path / "a" / "b"]
    assert not (tmp_path / JOURNAL).exists()
