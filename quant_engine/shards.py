"""The weight files that a conversion reads: fetched when the first parameter needs them, dropped after the last."""

import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from quant_engine.errors import CorruptCheckpointError
from quant_engine.parameters import Parameters
from quant_engine.safetensors_file import TensorSpec, read_header
from quant_engine.source import Source

DOWNLOADS = ".source"
"""Folder of fetched files in the unfinished folder of a conversion."""


class Shards:
    """The files of a source while parameters are read in the order of `names`.

    Files that are on this machine already are read where they are and stay. Others are fetched into `folder` and
    dropped when no later parameter needs them; with `keep` into Hugging Face's cache, where they stay. What a
    killed process left in `folder` is used as far as it is needed. say: told what is fetched, and how far.
    """

    def __init__(
        self,
        source: Source,
        found: Parameters,
        names: Sequence[str],
        folder: Path,
        *,
        keep: bool = False,
        say: Callable[[str], None],
    ) -> None:
        self._source, self._found, self._folder, self._keep, self._say = source, found, folder, keep, say
        self._last = last_needs(found, names)
        self._here = {path: path for path in source.shards if path.exists()}
        self._dropping: set[Path] = set()
        found.use(self._here)
        needed = {path.name for path in self._last}
        for path in folder.rglob("*"):
            if path.is_file() and (path.suffix == ".incomplete" or (path.parent == folder and path.name not in needed)):
                path.unlink()

    def steady(self, name: str) -> bool:
        """Whether files are neither fetched nor dropped where the parameter `name` is read."""
        here = self._found[name].files <= self._here.keys()
        return here and not any(self._last[path] == name for path in self._dropping)

    @contextmanager
    def reading(self, name: str) -> Generator[None]:
        """The files of the parameter `name` are here while the block runs, and dropped after it if they may be.

        Raises DownloadError where the network is lost, OSError where the disk does not take a file, and
        CorruptCheckpointError for a file that is not what its header said.
        """
        missing = self._found[name].files - self._here.keys()
        for path in sorted(missing):
            self._here[path] = self._fetch(path)
        if missing:
            self._found.use(self._here)
        yield
        done = {path for path in self._dropping if self._last[path] == name}
        for path in done:
            self._here.pop(path).unlink()
        if done:
            self._found.use(self._here)
            self._dropping -= done

    def close(self) -> None:
        """Remove the folder of fetched files."""
        if self._folder.exists():
            shutil.rmtree(self._folder)

    def _fetch(self, path: Path) -> Path:
        def tell(done: int, total: int, file: str) -> None:
            self._say(f"fetching {file}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB")

        if self._source.repository is None:
            raise CorruptCheckpointError(f"{path} disappeared while the model was read; put it back and run it again")
        tell(0, self._source.shard_bytes[path], path.name)
        place = self._source.repository.fetch(path.name, None if self._keep else self._folder, tell)
        held = {name: replace(info, path=path) for name, info in read_header(place).items()}
        if held != {name: info for name, info in self._source.tensors.items() if info.path == path}:
            raise CorruptCheckpointError(
                f"{path.name} came with other tensors than its header stated before; run it again, and report it to "
                "the repository's author if it stays so"
            )
        if not self._keep:
            self._dropping.add(path)
        return place


def read_order(found: Parameters, shards: Mapping[str, Sequence[TensorSpec]]) -> list[str]:
    """The parameters that are read to write these files, in order."""
    return [spec.name for specs in shards.values() for spec in specs if spec.name in found]


def last_needs(found: Parameters, names: Sequence[str]) -> dict[Path, str]:
    """The last of the parameters `names` that needs each file; files that none needs are not in it."""
    return {path: name for name in names for path in found[name].files}


def most_fetched(found: Parameters, names: Sequence[str], missing: Mapping[Path, int]) -> int:
    """The most bytes that are held of the files `missing` (with their sizes) when `names` are read in this order."""
    last = last_needs(found, names)
    held: set[Path] = set()
    most = 0
    for name in names:
        held |= found[name].files & missing.keys()
        most = max(most, sum(missing[path] for path in held))
        held = {path for path in held if last[path] != name}
    return most
