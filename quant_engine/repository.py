"""A repository on the Hugging Face Hub at one commit: sizes of its files, headers of its weights, the files."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)
from huggingface_hub.utils import tqdm

from quant_engine.errors import DISK_ERRORS, CorruptCheckpointError, DownloadError, SourceError
from quant_engine.near import near
from quant_engine.progress import Progress
from quant_engine.safetensors_file import TensorInfo, check_header

CONNECTIONS = 8
"""Headers that are read at once."""


@dataclass(frozen=True)
class Repository:
    """commit: what its revision stood for when it was asked for. sizes: bytes of its files by name."""

    name: str
    commit: str
    sizes: Mapping[str, int]

    @classmethod
    def find(cls, name: str, revision: str | None) -> Self:
        """The repository at the commit that `revision` stands for now.

        Raises SourceError where it cannot be reached or does not exist, ConnectionError without network.
        """
        try:
            info = huggingface_hub.model_info(name, revision=revision, files_metadata=True)
        except GatedRepoError as error:
            raise _gated(name) from error
        except RevisionNotFoundError as error:
            raise SourceError(f"{name} has no revision {revision!r}; give a branch, tag or commit of it") from error
        except RepositoryNotFoundError as error:
            raise SourceError(
                f"no repository {name} on the Hub, or it is private (`hf auth login`), and no folder of that "
                f"name{near(Path(name))}; check the spelling"
            ) from error
        except HFValidationError as error:
            raise SourceError(f"{name!r} is no repository name: {error}") from error
        except OfflineModeIsEnabled as error:
            raise ConnectionError(str(error)) from error
        except HfHubHTTPError as error:
            raise SourceError(f"the Hub answered for {name}: {error}; try again later") from error
        except Exception as error:
            if _is_network(error):
                raise ConnectionError(str(error)) from error
            raise
        return cls(name, cast(str, info.sha), {file.rfilename: file.size or 0 for file in info.siblings or []})

    def download(self, patterns: Sequence[str]) -> Path:
        """The folder in Hugging Face's cache with all files that match one of `patterns`, fetched if need be.

        Raises DownloadError where that stops on the way.
        """
        try:
            return Path(
                huggingface_hub.snapshot_download(self.name, revision=self.commit, allow_patterns=list(patterns))
            )
        except Exception as error:
            raise self._stopped("the files", error) from error

    def headers(self, files: Sequence[str], folder: Path) -> dict[str, dict[str, TensorInfo]]:
        """The tensors of safetensors files by file and name, as they will be once the files are in `folder`.

        Only the first bytes of each file are fetched. Raises CorruptCheckpointError for headers that cannot be,
        DownloadError without network.
        """
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            return dict(zip(files, pool.map(partial(self._header, folder=folder), files), strict=True))

    def _header(self, file: str, folder: Path) -> dict[str, TensorInfo]:
        try:
            found = huggingface_hub.parse_safetensors_file_metadata(self.name, file, revision=self.commit)
        except SafetensorsParsingError as error:
            raise CorruptCheckpointError(
                f"the header of {file} of {self.name} cannot be read ({error}); the repository may be damaged: report "
                "it to its author"
            ) from error
        except Exception as error:
            raise self._stopped(f"the header of {file}", error) from error
        entries = {name: vars(info) for name, info in found.tensors.items()}
        # The tensors fill the end of the file, so they tell where they begin.
        filled = max((info.data_offsets[1] for info in found.tensors.values()), default=0)
        return check_header(folder / file, entries, self.sizes[file] - filled, self.sizes[file])

    def fetch(self, file: str, folder: Path | None, progress: Progress) -> Path:
        """A file, fetched into `folder`, or into Hugging Face's cache where that is None, unless it is there already.

        progress: told bytes that came, of how many. Raises DownloadError where the network is lost, OSError where the
        disk does not take it.
        """

        def tell(count: int) -> None:
            progress(count, self.sizes[file], file)

        try:
            path = huggingface_hub.hf_hub_download(
                self.name, file, revision=self.commit, local_dir=folder, tqdm_class=_bar(tell)
            )
        except Exception as error:
            raise self._stopped(file, error) from error
        return Path(path)

    def _stopped(self, what: str, error: Exception) -> Exception:
        """What to raise for an error of a download: a full disk and a programmer's error stay what they are."""
        if isinstance(error, GatedRepoError):
            return _gated(self.name)
        on_disk = isinstance(error, OSError) and error.errno in DISK_ERRORS
        if on_disk or not (_is_network(error) or isinstance(error, (HfHubHTTPError, RuntimeError))):
            return error
        return DownloadError(f"the download of {what} of {self.name} stopped: {error}; run it again, it continues")


def _gated(name: str) -> SourceError:
    return SourceError(f"{name} needs its licence accepted on its page, then `hf auth login`")


def _is_network(error: BaseException) -> bool:
    """Connection and time-out errors of the HTTP client that huggingface_hub uses, whichever that is."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, OSError) or bool(kinds & {"TransportError", "ConnectionError", "Timeout"})


def _bar(tell: Callable[[int], None]) -> type[tqdm]:
    """A progress bar of the kind that huggingface_hub makes, which draws nothing and tells how many bytes came.

    One download may have two, of bytes that came and of bytes that were put together: the further one counts.
    """
    most = 0

    class Silent(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options | {"disable": True})

        def update(self, n: float | None = 1) -> None:
            nonlocal most
            self.n += n or 0
            if self.n > most:
                most = self.n
                tell(int(most))

    return Silent
