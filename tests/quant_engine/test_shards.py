"""A repository's weights are fetched when they are needed and dropped when they are not: by huggingface_hub's own
client, from a hub on this machine."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path
from typing import Any

import huggingface_hub
import mlx.core as mx
import pytest

from quant_engine.config import QuantConfig
from quant_engine.convert import convert
from quant_engine.errors import CorruptCheckpointError, DownloadError, OutputError, TurboQuantError
from quant_engine.parameters import Parameters
from quant_engine.plan import plan
from quant_engine.shards import DOWNLOADS, Shards
from quant_engine.source import peek
from tests.quant_engine.checkpoints import split, write_model
from tests.quant_engine.local_hub import COMMIT, REPOSITORY, LocalHub, local_hub
from tests.quant_engine.published import write_published

ROOT = Path(__file__).resolve().parents[2]
OUTPUT_SHARD = 40_000


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[LocalHub]:
    """A model of four shards on a hub."""
    with local_hub(split(write_model(tmp_path / "repository", num_hidden_layers=4), 4)) as hub:
        hub.use(monkeypatch, tmp_path / "cache")
        yield hub


def test_a_folded_model_comes_from_the_hub_as_from_a_folder(hub: LocalHub, tmp_path: Path) -> None:
    recipe = QuantConfig(fold_rotation=True)
    convert(REPOSITORY, tmp_path / "out", config=recipe, max_shard_bytes=OUTPUT_SHARD)
    assert_same(tmp_path / "out", tmp_path / "repository", config=recipe)


def shards(first: int, last: int, count: int = 4) -> list[str]:
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(first, last + 1)]


def run(output: Path, **options: Any) -> list[str]:
    """Convert the repository; what was said."""
    told: list[str] = []
    settings = {"max_shard_bytes": OUTPUT_SHARD, **options}
    convert(REPOSITORY, output, progress=lambda *tick: told.append(tick[2]), **settings)
    return told


def assert_same(made: Path, local: Path, **options: Any) -> None:
    """What came from the hub is what a local folder becomes, but for the name of the source."""
    other = made.with_name("local") / made.name
    convert(local, other, **{"max_shard_bytes": OUTPUT_SHARD, **options})
    assert sorted(os.listdir(made)) == sorted(os.listdir(other))
    for file in set(os.listdir(made)) - {"config.json", "README.md"}:
        assert (made / file).read_bytes() == (other / file).read_bytes(), file
    stated, expected = (json.loads((folder / "config.json").read_text()) for folder in (made, other))
    assert stated["quantization"].pop("source") == {"name": REPOSITORY, "revision": COMMIT, "content_sha256": None}
    del expected["quantization"]["source"]
    assert stated == expected


def held(place: Path) -> dict[str, int]:
    """Bytes of fetched weights beside an output, and of those that were deleted and are still open."""
    found: dict[str, int] = {}
    for path in [*place.glob(f".out.*/{DOWNLOADS}/*.safetensors"), *Path("/proc/self/fd").glob("*")]:
        with suppress(FileNotFoundError):  # other threads close and delete files meanwhile
            target = os.readlink(path) if path.is_symlink() else ""
            if not target or (target.startswith(str(place)) and "deleted" in target):
                found[str(path)] = path.stat().st_size
    return found


def interrupt(monkeypatch: pytest.MonkeyPatch, number: int, error: Exception) -> None:
    """Have the fetching of weights fail at the file `number`."""
    download, left = huggingface_hub.hf_hub_download, number

    def failing(repo: str, file: str, **options: Any) -> str:
        nonlocal left
        left -= 1
        if left == 0:
            raise error
        return download(repo, file, **options)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", failing)


@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe", "gpt_oss", "qwen3_5_moe"])
def test_what_becomes_of_a_repository_is_what_becomes_of_its_folder_with_two_files_at_most_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    found: list[dict[str, int]] = []
    options: dict[str, Any] = {"keep_unfitting": True, "config": QuantConfig(group_size=0)}
    with local_hub(split(write_published(name, tmp_path / "repository"), 3)) as hub:
        hub.use(monkeypatch, tmp_path / "cache")
        planned = plan(REPOSITORY, bits=[3], group_size=0, keep_unfitting=True)
        convert(REPOSITORY, tmp_path / "out", progress=lambda *_: found.append(held(tmp_path)), **options)
    assert hub.weights == shards(1, 3, 3)
    assert max(len(files) for files in found) <= 2
    most = max(sum(files.values()) for files in found)
    assert planned.rows[0].disk_bytes == planned.rows[0].size_bytes + most
    assert most < planned.download_bytes == planned.source_size_bytes
    assert_same(tmp_path / "out", hub.folder, max_shard_bytes=10**9, **options)


def test_only_one_file_is_held_where_none_is_shared(hub: LocalHub, tmp_path: Path) -> None:
    found: list[int] = []
    convert(REPOSITORY, tmp_path / "out", progress=lambda *_: found.append(len(held(tmp_path))))
    assert set(found) == {0, 1}
    assert not list((tmp_path / "cache").rglob("model-*.safetensors"))


def test_fetching_is_told(hub: LocalHub, tmp_path: Path) -> None:
    told = [message for message in run(tmp_path / "out") if "model-00002-of-00004" in message]
    size = (hub.folder / "model-00002-of-00004.safetensors").stat().st_size / 1e6
    assert told[0] == f"fetching model-00002-of-00004.safetensors: 0 of {size:,.0f} MB"


def test_what_is_in_the_cache_is_used_and_stays(hub: LocalHub, tmp_path: Path) -> None:
    cached = Path(huggingface_hub.hf_hub_download(REPOSITORY, shards(2, 2)[0], revision=COMMIT))
    hub.fetched.clear()
    assert plan(REPOSITORY).download_bytes < plan(hub.folder).source_size_bytes
    run(tmp_path / "out")
    assert hub.weights == [*shards(1, 1), *shards(3, 4)]
    assert cached.exists()
    assert_same(tmp_path / "out", hub.folder)


def test_weights_stay_in_the_cache_where_they_are_to_be_kept(hub: LocalHub, tmp_path: Path) -> None:
    run(tmp_path / "out", keep_source=True)
    assert hub.weights == shards(1, 4)
    assert (planned := plan(REPOSITORY)).download_bytes == 0
    assert planned.rows[0].disk_bytes == planned.rows[0].size_bytes
    run(tmp_path / "again", config=QuantConfig(bits=2))
    assert hub.weights == shards(1, 4)


KILLED = """
import os, signal, sys, time
from quant_engine.convert import convert
def progress(done, total, message):
    if message == "model.layers.2.mlp.down_proj":
        time.sleep(1)  # for what is finished meanwhile
        os.kill(os.getpid(), signal.SIGKILL)
convert("owner/name", sys.argv[1], max_shard_bytes=int(sys.argv[2]), progress=progress)
"""


def test_a_killed_conversion_goes_on_and_fetches_only_what_unfinished_files_need(hub: LocalHub, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "out"), str(OUTPUT_SHARD)]
    killed = subprocess.run(command, cwd=ROOT, env=hub.environment(tmp_path / "cache"), stderr=subprocess.DEVNULL)
    assert killed.returncode == -signal.SIGKILL
    assert hub.weights == shards(1, 3)
    assert [Path(path).name for path in held(tmp_path)] == shards(3, 3)
    hub.fetched.clear()
    told = run(tmp_path / "out")
    assert any(message.startswith("continuing: ") for message in told)
    assert hub.weights == shards(4, 4), "the third was there still, the first two were not needed any more"
    assert_same(tmp_path / "out", hub.folder)


def test_what_a_kill_left_and_nothing_needs_is_removed(hub: LocalHub, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "out"), str(OUTPUT_SHARD)]
    subprocess.run(command, cwd=ROOT, env=hub.environment(tmp_path / "cache"), stderr=subprocess.DEVNULL)
    left = next(tmp_path.glob(f".out.*/{DOWNLOADS}"))
    (left / shards(1, 1)[0]).write_bytes(b"not needed")
    (left / "broken.incomplete").write_bytes(b"half")
    found: list[bool] = []
    convert(
        REPOSITORY,
        tmp_path / "out",
        max_shard_bytes=OUTPUT_SHARD,
        progress=lambda *_: found.append((left / shards(1, 1)[0]).exists() or (left / "broken.incomplete").exists()),
    )
    assert not found[-1] and True not in found[2:]


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (OSError("connection reset"), DownloadError, r"download of model-00003-of-00004\.safetensors of owner/name "
         r"stopped: connection reset; run it again, it continues$"),
        (OSError(errno.ENOSPC, "no space"), OutputError, "the disk is full; what was finished is kept: free space, "
         "then run it again, it continues$"),
    ],
)  # fmt: skip
def test_a_lost_network_or_a_full_disk_keeps_what_was_finished(
    hub: LocalHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    kind: type[TurboQuantError],
    message: str,
) -> None:
    with monkeypatch.context() as patch, pytest.raises(kind, match=message):
        interrupt(patch, 3, error)
        run(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    hub.fetched.clear()
    assert any(text.startswith("continuing: ") for text in run(tmp_path / "out"))
    assert hub.weights in (shards(2, 4), shards(3, 4))
    assert_same(tmp_path / "out", hub.folder)
    assert not list(tmp_path.glob(".out*"))


def test_a_programming_error_while_fetching_is_not_taken_for_a_lost_network(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, 2, ZeroDivisionError("bug"))
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "out")
    assert not list(tmp_path.glob(".out*"))


def test_a_cancel_while_a_file_comes_leaves_nothing(hub: LocalHub, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int, message: str) -> None:
        if message.startswith("fetching model-00002"):
            raise Stop

    with pytest.raises(Stop):
        convert(REPOSITORY, tmp_path / "out", progress=stop)
    assert not list(tmp_path.glob(".out*"))


def test_a_file_that_is_not_what_its_header_said_is_refused(hub: LocalHub, tmp_path: Path) -> None:
    def swap(done: int, total: int, message: str) -> None:
        if message.startswith("fetching model-00002"):
            mx.save_safetensors(str(hub.folder / shards(2, 2)[0]), {"other": mx.ones(3)})

    with pytest.raises(CorruptCheckpointError, match=r"^model-00002-of-00004\.safetensors came with other tensors"):
        convert(REPOSITORY, tmp_path / "out", progress=swap)
    assert not list(tmp_path.glob(".out*"))


def test_a_disk_that_is_too_small_is_refused_before_weights_are_fetched(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = plan(REPOSITORY, bits=[3]).rows[0].disk_bytes
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": needed + 15_900_000})())
    with pytest.raises(OutputError, match="MB are free there; free some space"):
        run(tmp_path / "out")
    assert hub.weights == []


@pytest.mark.parametrize(
    ("damage", "fetched"),
    [
        (lambda content: content.replace(b'"data_offsets":[0,', b'"data_offsets":[2,'), 0),
        (lambda content: b"\x08" + b"\0" * 7 + b"nonsense", 0),
        (lambda content: content[:-100], 2),
    ],
    ids=["a gap", "no header", "cut"],
)
def test_a_damaged_file_is_refused_by_name_as_early_as_it_shows(
    hub: LocalHub, tmp_path: Path, damage: Callable[[bytes], bytes], fetched: int
) -> None:
    file = hub.folder / shards(2, 2)[0]
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CorruptCheckpointError, match=r"model-00002-of-00004\.safetensors"):
        run(tmp_path / "out")
    assert len(hub.weights) == fetched
    assert not list(tmp_path.glob(".out*"))


def test_a_local_file_that_disappears_is_named(tmp_path: Path) -> None:
    folder = split(write_model(tmp_path / "in"), 3)
    source = peek(folder)
    found = Parameters(source.config, source.tensors)
    (folder / shards(2, 2, 3)[0]).unlink()
    reading = Shards(source, found, list(found), tmp_path / "none", say=lambda _: None)
    with pytest.raises(CorruptCheckpointError, match=r"model-00002-of-00003\.safetensors disappeared while"):
        for name in found:
            with reading.reading(name):
                pass
