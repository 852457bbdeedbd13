"""Kills a conversion before every step that counts, and runs it again: run as a program by test_convert_resumed.py.

`kill_lab.py SOURCE FOLDER` ends the n-th conversion of SOURCE by SIGKILL just before its n-th step (a shard or the
journal opened for writing, a layer within a shard, anything renamed or deleted), until one comes to its end. What the
kill left and what the next run made of it is printed as JSON.
"""

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numba

from quant_engine.convert import convert
from quant_engine.journal import JOURNAL
from tests.forked import in_child

MAX_SHARD_BYTES = 70_000
WITHIN = "model.layers.1.mlp.gate_proj"


@numba.njit
def warm_up(number: int) -> int:
    return number


def convert_until_killed(source: Path, output: Path, number: int, log: Path) -> None:
    left, place = number, str(output.parent)

    def step(what: str) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            log.write_text(what)
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        name = str(arguments[0]) if arguments else ""
        if left < 1 or not name.startswith(place):
            return
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes and name.endswith((".safetensors", JOURNAL))) or event in ("os.rename", "os.remove"):
            step(f"{event} {Path(name).name}")

    def progress(done: int, total: int, message: str) -> None:
        if message == WITHIN:
            step(message)

    sys.addaudithook(hook)
    convert(source, output, max_shard_bytes=MAX_SHARD_BYTES, progress=progress)


def resume(source: Path, output: Path, log: Path) -> None:
    told: list[str] = []
    made = convert(source, output, max_shard_bytes=MAX_SHARD_BYTES, progress=lambda *tick: told.append(tick[2]))
    said = next((message for message in told if message.startswith("continuing")), None)
    log.write_text(json.dumps({"said": said, "files": [list(file) for file in made.files]}))


def noted(place: Path) -> dict[str, list[int]]:
    """Inode and time of change of each shard that is noted as finished, by name."""
    found: dict[str, list[int]] = {}
    for journal in place.glob(f".out.partial-*/{JOURNAL}"):
        for line in filter(None, journal.read_text().splitlines()):
            name = json.loads(line)["name"]
            found[name] = identity(journal.with_name(name))
    return found


def identity(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_ino, status.st_mtime_ns]


def main(source: Path, folder: Path) -> None:
    warm_up(1)  # or each child would spend most of its time on loading numba
    for number in range(1, 100):
        place, log = folder / str(number), folder / f"{number}.log"
        place.mkdir()
        code = in_child(partial(convert_until_killed, source, place / "out", number, log))
        if code not in (0, -signal.SIGKILL):
            sys.exit(f"the conversion failed by itself in repetition {number}")
        if code == 0:
            print(json.dumps({"number": number, "before": "end"}), flush=True)
            return
        before, finished = log.read_text(), noted(place)
        if in_child(partial(resume, source, place / "out", log)):
            sys.exit(f"the conversion killed before {before} did not go on")
        kept = [name for name, was in finished.items() if identity(place / "out" / name) == was]
        outcome = {"number": number, "before": before, "finished": list(finished), "kept": kept}
        print(json.dumps(outcome | json.loads(log.read_text())), flush=True)
    sys.exit("the conversion did not end")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
