"""Texts to measure on: where they come from, and what is refused."""

import hashlib
import pydoc_data.topics
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from quant_engine.errors import InputError
from quant_engine.text import DATA_SETS, load_text


def test_a_file_comes_with_its_name_and_the_hash_of_its_bytes(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_bytes("naïve text".encode())
    text = load_text(file)
    assert (text.name, text.text) == ("notes.txt", "naïve text")
    assert text.sha256 == hashlib.sha256("naïve text".encode()).hexdigest()


def test_without_a_file_the_text_is_the_one_that_python_carries() -> None:
    text = load_text()
    assert text.name.startswith("pydoc_data.topics of Python 3.")
    assert pydoc_data.topics.topics["while"] in text.text
    assert len(text.text) > 300_000


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"ab\xff", ["UTF-8", "byte 2", "0xff"]),
        (b" \n\n", ["empty"]),
        (None, ["cannot be read", "No such file", "wikitext2"]),
    ],
    ids=["bytes that are not UTF-8", "white space only", "no file"],
)
def test_an_unusable_file_is_refused_in_words(content: bytes | None, words: list[str], tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_text(file)
    assert all(word in str(caught.value) for word in words), caught.value


def test_an_empty_name_is_not_taken_for_a_folder() -> None:
    with pytest.raises(InputError, match="the name of the text is empty; give the path of a UTF-8 text file, or"):
        load_text("")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="directory"):
        load_text(tmp_path)


def an_archive(folder: Path, member: str) -> Path:
    archive = folder / "set.zip"
    with zipfile.ZipFile(archive, "w") as files:
        files.writestr(member, "text of the set")
    return archive


def test_a_data_set_is_read_from_its_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = DATA_SETS["wikitext2"]
    archive = an_archive(tmp_path, known.member)
    asked: list[tuple[Any, ...]] = []

    def download(*names: str, repo_type: str) -> str:
        asked.append((*names, repo_type))
        return str(archive)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    text = load_text("wikitext2")
    assert (text.name, text.text) == ("wikitext2", "text of the set")
    assert asked == [(known.repository, known.archive, "dataset")]


def test_a_data_set_without_its_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = an_archive(tmp_path, "other.raw")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(archive))
    with pytest.raises(InputError, match=r"came without wikitext-2-raw/wiki\.test\.raw"):
        load_text("wikitext2")


def test_a_data_set_out_of_reach_says_what_else_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: str, **__: str) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(InputError, match=r"wikitext2.*no connection.*built-in text"):
        load_text("wikitext2")


def test_a_file_named_like_a_data_set_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wikitext2").write_text("mine")
    monkeypatch.chdir(tmp_path)
    assert load_text("wikitext2").text == "mine"
