"""Kills a registry before every change that it makes: run as a program by test_crashes.py.

`crash_lab.py SCENARIO FOLDER` repeats a scenario in FOLDER/work, each time from the same start, and ends
the n-th repetition by SIGKILL just before its n-th change of the disk (a commit, or a file or folder made,
renamed or deleted), until one comes to its end. What another process then finds is printed as JSON.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, event

from registry import ModelRecord, open_registry
from tests.forked import in_child

Act = Callable[[Path], None]

CONTENT = b"weights" * 1000


def record(name: str) -> ModelRecord:
    return ModelRecord(
        name=name, source="org/tiny", source_sha256="a" * 64, architecture="llama", parameters=1,
        bits_per_weight=3.25, recipe={"bits": 3}, versions={},
    )  # fmt: skip


def publish(folder: Path, name: str = "new", final: Path | None = None) -> None:
    with open_registry(folder / "home") as opened, opened.staging(name, final) as staging:
        staging.mkdir()
        (staging / "model.safetensors").write_bytes(CONTENT)
        (staging / "config.json").write_text("{}")
        opened.publish(record(name), staging, final)


def publish_elsewhere(folder: Path) -> None:
    publish(folder, final=folder / "elsewhere" / "new")


def remove(folder: Path) -> None:
    with open_registry(folder / "home") as opened:
        opened.remove("old")


def remove_elsewhere(folder: Path) -> None:
    with open_registry(folder / "home") as opened:
        opened.remove("outside")


def reopen(folder: Path) -> None:
    open_registry(folder / "home").close()


def two_models(folder: Path) -> None:
    (folder / "elsewhere").mkdir()
    publish(folder, "old")
    publish(folder, "outside", folder / "elsewhere" / "outside")


def two_models_and_a_killed(act: Act) -> Act:
    def prepare(folder: Path) -> None:
        two_models(folder)
        in_child(lambda: dying_in_rename(act, folder))

    return prepare


def dying_in_rename(act: Act, folder: Path) -> None:
    setattr(Path, "rename", lambda *_: os.kill(os.getpid(), signal.SIGKILL))  # noqa: B010
    act(folder)


def nothing(_folder: Path) -> None:
    """The start of a scenario that opens a registry for the first time."""


SCENARIOS: dict[str, tuple[Act, Act]] = {
    "publish": (two_models, publish),
    "publish-elsewhere": (two_models, publish_elsewhere),
    "remove": (two_models, remove),
    "remove-elsewhere": (two_models, remove_elsewhere),
    "recover-publish": (two_models_and_a_killed(publish), reopen),
    "recover-remove": (two_models_and_a_killed(remove), reopen),
    "first-open": (nothing, reopen),
}


def die_before_change(number: int, log: Path) -> None:
    """From now on, end this process before its change of that number, noting which it is."""
    left = number

    def change(what: str) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.write(descriptor, what.encode())
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        if name in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            change(f"{name} {arguments[0]}")
        elif name == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR) and left > 0:
            change(f"write {arguments[0]}")

    event.listen(Engine, "commit", lambda _: change("commit"))
    sys.addaudithook(hook)


def act_until_killed(act: Act, folder: Path, number: int, log: Path) -> None:
    die_before_change(number, log)
    act(folder)


def inspect(folder: Path) -> dict[str, Any]:
    """What a process that opens the registry afterwards finds."""
    with open_registry(folder / "home") as opened:
        models = opened.models().models
        return {
            "recovered": [recovery.action for recovery in opened.recovered],
            "models": sorted(model.name for model in models),
            "whole": all(opened.verify(model.name).ok for model in models),
            "folders": sorted(
                path.name
                for root in (opened.models_root, folder / "elsewhere")
                if root.is_dir()
                for path in root.iterdir()
                if not path.name.startswith((".staging", ".tq-staging-"))
            ),
            "staged": staged(folder),
        }


def staged(folder: Path) -> list[str]:
    """Names of slots, and of folders beside models that belong to slots."""
    slots = [*folder.glob("home/models/.staging/*"), *folder.glob("elsewhere/.tq-staging-*")]
    return [path.name for path in slots]


def again(act: Act, folder: Path) -> str:
    """The same act once more: "done", or what is said against it."""
    try:
        act(folder)
    except Exception as error:
        return str(error)
    return "done"


def main(name: str, folder: Path) -> None:
    prepare, act = SCENARIOS[name]
    work, start, log = folder / "work", folder / "start", folder / "log"
    work.mkdir(parents=True)
    if in_child(lambda: prepare(work)):
        sys.exit(f"the start of {name} could not be made")
    work.rename(start)
    for number in range(1, 500):
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(start, work)
        code = in_child(partial(act_until_killed, act, work, number, log))
        if code not in (0, -signal.SIGKILL):
            sys.exit(f"{name} failed by itself in repetition {number}")
        found = {**inspect(work), "again": again(act, work), "before": log.read_text() if code else "end"}
        print(json.dumps({**found, "left": staged(work)}), flush=True)
        if code == 0:
            return
    sys.exit(f"{name} did not end")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
