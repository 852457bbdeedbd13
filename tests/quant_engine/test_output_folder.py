import errno
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from quant_engine import output_folder
from quant_engine.errors import DownloadError, OutputError, SourceError
from quant_engine.output_folder import atomic_folder


def _make(output: Path, text: str = "new", *, overwrite: bool = False, size_bytes: int = 10) -> None:
    with atomic_folder(output, size_bytes=size_bytes, overwrite=overwrite) as folder:
        (folder / "config.json").write_text(text)
        (folder / "model.safetensors").write_text(text)
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "deep.jinja").write_text(text)


def test_the_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "new" / "model", size_bytes=10) as folder:
        (folder / "config.json").write_text("x")
        assert not (tmp_path / "new" / "model").exists()
    assert (tmp_path / "new" / "model" / "config.json").read_text() == "x"
    assert os.listdir(tmp_path / "new") == ["model"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_nothing_behind(tmp_path: Path, failure: type[BaseException]) -> None:
    with pytest.raises(failure), atomic_folder(tmp_path / "model", size_bytes=10) as folder:
        (folder / "half").write_text("x")
        raise failure
    assert os.listdir(tmp_path) == []


def test_a_folder_that_exists_is_kept_unless_asked(tmp_path: Path) -> None:
    _make(tmp_path / "model", "old")
    with pytest.raises(
        OutputError, match=r"model exists already; choose another output, or ask for it to be overwritten"
    ):
        _make(tmp_path / "model")
    assert (tmp_path / "model" / "config.json").read_text() == "old"
    _make(tmp_path / "model", overwrite=True)
    assert (tmp_path / "model" / "config.json").read_text() == "new"
    assert os.listdir(tmp_path) == ["model"]


def test_overwriting_keeps_the_old_folder_until_the_new_one_is_whole(tmp_path: Path) -> None:
    _make(tmp_path / "model", "old")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "model", size_bytes=10, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
        raise RuntimeError
    assert (tmp_path / "model" / "config.json").read_text() == "old"


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    _make(tmp_path / "model")
    assert (tmp_path / "model" / "config.json").exists()
    assert os.listdir(tmp_path) == ["model"]


def test_only_models_are_overwritten(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("meow")
    with pytest.raises(
        OutputError, match=r"photos is not a model \(it has no config\.json\), so it is not overwritten"
    ):
        _make(tmp_path / "photos", overwrite=True)
    assert (tmp_path / "photos" / "cat.jpg").exists()


@pytest.mark.parametrize("name", ["notes.txt", "sub/config.json", ".env"])
def test_a_model_beside_which_other_files_lie_is_not_overwritten(tmp_path: Path, name: str) -> None:
    _make(tmp_path / "model", "old")
    (tmp_path / "model" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "model" / name).write_text("mine")
    with pytest.raises(OutputError, match=rf"belongs to no model \({re.escape(name)}\)"):
        _make(tmp_path / "model", overwrite=True)
    assert (tmp_path / "model" / name).read_text() == "mine"


def test_settings_without_weights_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OutputError, match=r"is not a model \(it has no model\*\.safetensors\)"):
        _make(tmp_path, overwrite=True)


def test_a_file_or_a_link_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("file", "link"):
        with pytest.raises(OutputError, match="is not a folder"):
            _make(tmp_path / name, overwrite=True)


def test_a_disk_that_is_too_small_is_refused_before_writing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"would take 1,000,000,000,000 MB and .* are free there; free some space"):
        _make(tmp_path / "model", size_bytes=10**18)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "words"), [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "quota"), (errno.EROFS, "read-only")]
)
def test_a_disk_that_fails_while_writing_leaves_nothing(tmp_path: Path, code: int, words: str) -> None:
    with (
        pytest.raises(OutputError, match=f"cannot write .*model: .*{words}.*; nothing was left there"),
        atomic_folder(tmp_path / "model", size_bytes=10) as folder,
    ):
        (folder / "half").write_text("x")
        raise OSError(code, os.strerror(code))
    assert os.listdir(tmp_path) == []


def test_other_errors_of_the_system_are_not_disguised(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "model", size_bytes=10) as folder:
        (folder / "absent").read_text()


def test_what_a_killed_process_left_is_removed_the_next_time(tmp_path: Path) -> None:
    (tmp_path / ".model.partial-dead").mkdir()
    (tmp_path / ".other.partial-dead").mkdir()
    _make(tmp_path / "model")
    assert sorted(os.listdir(tmp_path)) == [".other.partial-dead", "model"]


def test_what_a_running_process_writes_is_left_alone(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "model", size_bytes=10) as first:
        (first / "config.json").write_text("first")
        with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "model", size_bytes=10):
            raise ZeroDivisionError
        assert first.exists()
    assert (tmp_path / "model" / "config.json").read_text() == "first"


def test_what_a_killed_process_left_of_the_same_key_is_given_as_it_was_left(tmp_path: Path) -> None:
    for left in (".model.partial-aaa-1", ".model.partial-aaab-1", ".model.partial-new-1", ".other.partial-aaa-1"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "config.json").write_text(left)
    with atomic_folder(tmp_path / "model", size_bytes=10, key="aaa") as folder:
        assert sorted(os.listdir(tmp_path)) == [".model.partial-aaa-1", ".other.partial-aaa-1"]
        assert folder.name == ".model.partial-aaa-1"
    assert (tmp_path / "model" / "config.json").read_text() == ".model.partial-aaa-1"


def test_an_exception_removes_what_was_taken_over(tmp_path: Path) -> None:
    (tmp_path / ".model.partial-aaa-1").mkdir()
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "model", size_bytes=10, key="aaa"):
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("failure", [DownloadError("lost"), OSError(errno.ENOSPC, "full"), OSError("reset by peer")])
def test_where_work_is_to_be_kept_a_lost_network_or_a_full_disk_leaves_it_for_the_same_key(
    tmp_path: Path, failure: Exception
) -> None:
    with (
        pytest.raises((DownloadError, OutputError, OSError)) as raised,
        atomic_folder(tmp_path / "model", size_bytes=10, key="k1", keep=True) as folder,
    ):
        (folder / "half").write_text("x")
        raise failure
    assert str(failure) in str(raised.value) or "the disk is full; what was finished is kept" in str(raised.value)
    with (
        pytest.raises(OutputError, match="are free there"),
        atomic_folder(tmp_path / "model", size_bytes=10**18, key="k1", keep=True),
    ):
        pass
    with atomic_folder(tmp_path / "model", size_bytes=10, key="k1", keep=True) as again:
        assert again == folder and (again / "half").read_text() == "x"
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SourceError])
def test_any_other_end_leaves_nothing_even_where_work_is_to_be_kept(
    tmp_path: Path, failure: type[BaseException]
) -> None:
    with pytest.raises(failure), atomic_folder(tmp_path / "model", size_bytes=10, key="k1", keep=True) as folder:
        (folder / "half").write_text("x")
        raise failure
    assert os.listdir(tmp_path) == []


def test_a_live_folder_of_the_same_key_is_not_taken_over(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="exists already"),
        atomic_folder(tmp_path / "model", size_bytes=10, key="aaa") as first,
        atomic_folder(tmp_path / "model", size_bytes=10, key="aaa") as second,
    ):
        assert first != second
        (second / "config.json").write_text("second")
        _make(tmp_path / "model", "third")
    assert (tmp_path / "model" / "config.json").read_text() == "third"
    assert os.listdir(tmp_path) == ["model"]


def test_a_folder_that_another_process_took_before_it_was_locked_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Path] = []

    def take_the_first(folder: Path) -> int | None:
        if taken:
            return lock(folder)
        taken.append(folder)
        return None

    lock = output_folder._lock
    monkeypatch.setattr(output_folder, "_lock", take_the_first)
    with atomic_folder(tmp_path / "model", size_bytes=10) as folder:
        assert taken and folder not in taken


def test_what_is_there_already_needs_no_more_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def left(name: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard").write_bytes(os.urandom(10_000_000))

    monkeypatch.setattr(output_folder.shutil, "disk_usage", lambda _: SimpleNamespace(free=20_000_000))
    left(".model.partial-aaa-1")
    with atomic_folder(tmp_path / "model", size_bytes=13_000_000, key="aaa"):
        pass
    left(".second.partial-aaa-1")
    with pytest.raises(OutputError, match="free some space"):
        _make(tmp_path / "second", size_bytes=13_000_000)


def test_of_two_processes_the_second_to_finish_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="exists already"), atomic_folder(tmp_path / "model", size_bytes=10) as slow:
        (slow / "config.json").write_text("slow")
        _make(tmp_path / "model", "fast")
    assert (tmp_path / "model" / "config.json").read_text() == "fast"


def test_a_process_killed_while_replacing_loses_nothing(tmp_path: Path) -> None:
    _make(tmp_path / "model", "old")
    (tmp_path / "model").rename(tmp_path / ".model.replaced-dead")
    with pytest.raises(OutputError, match="exists already"):
        _make(tmp_path / "model")
    assert (tmp_path / "model" / "config.json").read_text() == "old"
    _make(tmp_path / "model", overwrite=True)
    (tmp_path / ".model.replaced-dead").mkdir()
    _make(tmp_path / "model", "newer", overwrite=True)
    assert os.listdir(tmp_path) == ["model"]


def test_everything_is_flushed_before_the_name_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(output_folder.os, "fsync", lambda descriptor: order.append("sync"))
    monkeypatch.setattr(Path, "rename", lambda self, target: order.append("rename"))
    _make(tmp_path / "model")
    assert order == ["sync"] * 5 + ["rename", "sync"]
