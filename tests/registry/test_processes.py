"""Several processes use one registry at once."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from registry import Model, Registry, open_registry

WORKERS = Path(__file__).with_name("workers.py")
ROOT = WORKERS.parents[2]


def start(task: str, home: Path, times: int, who: str) -> subprocess.Popen[str]:
    code = f"import sys, runpy; sys.path.insert(0, {str(ROOT)!r}); sys.argv[1:] = sys.argv[1:]; "
    code += f"runpy.run_path({str(WORKERS)!r}, run_name='__main__')"
    command = [sys.executable, "-c", code, task, str(home), str(times), who]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> list[str]:
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    return out.split()


def test_three_processes_lose_none_of_their_read_modify_writes(
    home: Path, registry: Registry, publish: Callable[..., Model]
) -> None:
    publish("counter", seed=0)
    running = [start("count", home, 150, who) for who in "abc"]
    for process in running:
        finish(process)
    assert registry.get("counter").seed == 450


def test_three_processes_publish_at_once_and_one_wins_each_name(home: Path) -> None:
    running = [start("publish", home, 5, who) for who in "abc"]
    with open_registry(home) as registry:
        while any(process.poll() is None for process in running):
            for model in registry.models().models:
                assert registry.verify(model.name).ok, "a model was listed before its files were there"
        won = sorted(name for process in running for name in finish(process))
        models = registry.models(sort="name", limit=100).models
        assert [model.name for model in models] == won
        assert len([name for name in won if name.startswith("shared")]) == 5
        assert len(won) == 5 * 4
        assert all(registry.verify(name).ok for name in won)
        assert list((registry.models_root / ".staging").iterdir()) == []


def test_what_a_killed_process_was_making_is_deleted_by_the_next_model_and_what_a_live_one_makes_is_not(
    home: Path, registry: Registry
) -> None:
    with registry.staging("alive") as alive:
        alive.mkdir()
        killed = start("convert", home, 1, "dead")
        left = Path(killed.communicate(timeout=60)[0].strip())
        assert (left / "half.safetensors").exists()
        open_registry(home).close()
        assert left.parent.exists()
        with registry.staging("another"):
            assert not left.parent.exists()
            assert alive.exists()
    assert not alive.exists()


@pytest.mark.parametrize("outside", [False, True])
def test_the_same_model_finds_what_a_killed_process_had_beside_it(
    home: Path, registry: Registry, tmp_path: Path, publish: Callable[..., Model], outside: bool
) -> None:
    final = tmp_path / "place" / "dead" if outside else None
    left = Path(start("convert", home, 1, str(final or "dead")).communicate(timeout=60)[0].strip())
    open_registry(home).close()
    with registry.staging("dead", final) as staging:
        assert staging == left
        assert not staging.exists(), "half a folder was handed out as a new one"
        assert (staging.parent / "beside").is_dir()
    assert not left.parent.exists()
    publish("dead", final)
    assert list((registry.models_root / ".staging").iterdir()) == []
    assert not outside or [path.name for path in (tmp_path / "place").iterdir()] == ["dead"]


def test_two_processes_that_make_the_same_model_have_a_slot_each(registry: Registry) -> None:
    with registry.staging("same") as first:
        (first.parent / "beside").mkdir()
        with registry.staging("same") as second:
            assert second.parent != first.parent
            assert not (second.parent / "beside").exists()
        assert (first.parent / "beside").exists()


def test_a_slot_that_holds_a_finished_model_is_not_used_before_that_is_published(
    home: Path, registry: Registry
) -> None:
    start("die-publishing", home, 1, "whole").communicate(timeout=60)
    with registry.staging("whole"), registry.staging("other"):
        pass
    with open_registry(home) as opened:
        assert [recovery.action for recovery in opened.recovered] == ["published"]
        assert opened.verify("whole").ok
    assert list((registry.models_root / ".staging").iterdir()) == []
