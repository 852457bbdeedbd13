"""A conversion that was killed goes on from its last finished shard and ends as one that was not."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from quant_engine.config import QuantConfig
from quant_engine.convert import convert
from quant_engine.file_hash import file_sha256
from quant_engine.journal import JOURNAL
from tests.quant_engine.checkpoints import write_model

LAB = Path(__file__).with_name("kill_lab.py")
ROOT = LAB.parents[2]
SHARD = 40_000
CONTENT = ("config.json", "model.safetensors")

PAUSING = """
import sys, time
import mlx.core as mx
mx.set_default_device(mx.cpu)  # as in the tests
from quant_engine.config import QuantConfig
from quant_engine.convert import convert
def progress(done, total, message):
    if done > total / 2:
        time.sleep(1)  # for what is finished meanwhile
        print("half", flush=True)
        time.sleep(60)
recipe = QuantConfig(fold_rotation=sys.argv[4] == "True")
convert(sys.argv[1], sys.argv[2], config=recipe, max_shard_bytes=int(sys.argv[3]), progress=progress)
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextmanager
def half_done(place: Path, fold_rotation: bool = False) -> Generator[Path]:
    """The partial folder of a process that is converting place/in to place/out; it is killed at the end."""
    command = [sys.executable, "-c", PAUSING, str(place / "in"), str(place / "out"), str(SHARD), str(fold_rotation)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "half\n"
            yield next(place.glob(".out.partial-*"))
        finally:
            process.send_signal(signal.SIGKILL)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, and what a conversion of it left that was killed half-way."""
    place = tmp_path_factory.mktemp("killed")
    write_model(place / "in")
    with half_done(place):
        pass
    return place


@pytest.fixture
def place(killed: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change, with the very files of the source: copies would be other ones."""
    copy = Path(shutil.copytree(killed, tmp_path / "place"))
    for name in CONTENT:
        (copy / "in" / name).unlink()
        (copy / "in" / name).symlink_to(killed / "in" / name)
    return copy


def run(place: Path, **options: Any) -> list[str]:
    """Convert again; what was said of going on. The result is as that of a conversion that starts from nothing."""
    told: list[str] = []
    settings = {"max_shard_bytes": SHARD, **options}
    made = convert(place / "in", place / "out", progress=lambda *tick: told.append(tick[2]), **settings)
    convert(place / "in", place.with_name("whole") / "out", **settings)
    assert contents(place / "out") == contents(place.with_name("whole") / "out")
    assert sorted(os.listdir(place)) == ["in", "out"]
    assert all(file_sha256(place / "out" / file.name) == file.sha256 for file in made.files)
    return [message for message in told if message.startswith("continuing")]


def test_killed_at_any_step_it_ends_the_same_and_no_finished_shard_is_written_again(tmp_path: Path) -> None:
    write_model(tmp_path / "in")
    (tmp_path / "work").mkdir()
    command = [sys.executable, str(LAB), str(tmp_path / "in"), str(tmp_path / "work")]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": "."})
    assert finished.returncode == 0, finished.stderr
    *kills, end = [json.loads(line) for line in finished.stdout.splitlines()]
    reference = contents(tmp_path / "work" / str(end["number"]) / "out")
    shards = sum(name.endswith(".safetensors") for name in reference)
    assert shards == 3 and len(kills) >= 2 * shards + 3, "the lab killed it in fewer places than there are"
    for kill in kills:
        assert contents(tmp_path / "work" / str(kill["number"]) / "out") == reference, kill
        assert os.listdir(tmp_path / "work" / str(kill["number"])) == ["out"], kill
        assert [file[0] for file in kill["files"]] == sorted(reference)
        assert kill["kept"] == kill["finished"], kill
        count = len(kill["finished"])
        assert kill["said"] == (f"continuing: {count} of {shards} shards were finished before" if count else None)
    assert {len(kill["finished"]) for kill in kills} == {0, 1, 2, 3}
    assert kills[-1]["before"].startswith("os.rename") and kills[-2]["before"] == f"os.remove {JOURNAL}"


def test_a_source_that_was_moved_is_the_same(place: Path) -> None:
    (place / "in").rename(place / "moved")
    (place / "in").symlink_to(place / "moved")
    told: list[str] = []
    convert(place / "in", place / "out", max_shard_bytes=SHARD, progress=lambda *tick: told.append(tick[2]))
    assert "continuing: 3 of 5 shards were finished before" in told


def test_files_that_are_no_weights_are_taken_as_they_are_now(place: Path) -> None:
    left = next(place.glob(".out.partial-*"))
    (left / "merges.txt").write_text("of another run")
    (left / "deep").mkdir()
    (place / "in" / "tokenizer.json").write_text('{"version": "2.0"}')
    assert len(run(place)) == 1
    assert (place / "out" / "tokenizer.json").read_text() == '{"version": "2.0"}'


def test_a_folded_conversion_goes_on_too(tmp_path: Path) -> None:
    write_model(tmp_path / "place" / "in", tie_word_embeddings=True)
    with half_done(tmp_path / "place", fold_rotation=True):
        pass
    assert run(tmp_path / "place", config=QuantConfig(fold_rotation=True)) == [
        "continuing: 2 of 4 shards were finished before"
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"config": QuantConfig(bits=4)},
        {"config": QuantConfig(seed=1)},
        {"config": QuantConfig(scale="rms")},
        {"config": QuantConfig(fold_rotation=True)},
        {"dtype": "float16"},
        {"max_shard_bytes": SHARD + 10_000},
    ],
)
def test_another_recipe_starts_anew(place: Path, options: dict[str, Any]) -> None:
    assert run(place, **options) == []


def test_another_source_starts_anew(place: Path) -> None:
    shutil.rmtree(place / "in")
    write_model(place / "in", weights=lambda made: made | {"model.norm.weight": mx.ones(128).astype(mx.bfloat16)})
    assert run(place) == []


@pytest.mark.parametrize("name", CONTENT)
def test_a_source_of_the_same_size_and_time_that_was_written_since_starts_anew(place: Path, name: str) -> None:
    file = place / "in" / name
    before, content = file.stat(), bytearray(file.read_bytes())
    file.unlink()
    content[-2] ^= 1 if name.endswith(".safetensors") else 0
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert run(place) == []


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


@pytest.mark.parametrize("spoil", [cut, alter, link, Path.unlink])
def test_a_finished_shard_that_changed_is_written_again(place: Path, spoil: Callable[[Path], None]) -> None:
    spoil(next(place.glob(".out.partial-*/model-00002-of-*")))
    assert run(place) == ["continuing: 2 of 5 shards were finished before"]
    assert not any(path.is_symlink() for path in (place / "out").iterdir())


def test_a_journal_that_is_not_whole_counts_as_far_as_it_goes(place: Path) -> None:
    journal = next(place.glob(f".out.partial-*/{JOURNAL}"))
    journal.write_bytes(journal.read_bytes()[:-20])
    assert run(place) == ["continuing: 2 of 5 shards were finished before"]


def test_a_journal_of_nonsense_counts_for_nothing(place: Path) -> None:
    journal = next(place.glob(f".out.partial-*/{JOURNAL}"))
    journal.write_bytes(b'\xff\x00\n[1]\n{"name": "config.json"}\n"x"\n3\n')
    assert run(place) == []


def test_a_cancel_leaves_nothing_of_what_was_continued(place: Path) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int, message: str) -> None:
        if message.startswith("continuing"):
            raise Stop

    with pytest.raises(Stop):
        convert(place / "in", place / "out", max_shard_bytes=SHARD, progress=stop)
    assert os.listdir(place) == ["in"]


def test_what_a_live_process_is_making_is_not_taken_over(tmp_path: Path) -> None:
    write_model(tmp_path / "in")
    told: list[str] = []
    with half_done(tmp_path) as live:
        before = contents(live)
        convert(tmp_path / "in", tmp_path / "out", max_shard_bytes=SHARD, progress=lambda *tick: told.append(tick[2]))
        assert contents(live) == before and JOURNAL in before
    assert not any(message.startswith("continuing") for message in told)
    assert sorted(os.listdir(tmp_path)) == sorted([live.name, "in", "out"])
