"""The text that a model is measured on: a file, text that every CPython carries, or a public data set."""

import hashlib
import platform
import pydoc_data.topics
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from quant_engine.errors import InputError


@dataclass(frozen=True)
class Text:
    """A text with a name for reports and the sha256 of its UTF-8 bytes."""

    name: str
    text: str
    sha256: str

    @classmethod
    def of(cls, name: str, text: str) -> "Text":
        """The text under this name, its hash computed."""
        return cls(name, text, hashlib.sha256(text.encode()).hexdigest())


@dataclass(frozen=True)
class DataSet:
    """One text file inside an archive of a Hugging Face data set repository."""

    repository: str
    archive: str
    member: str


DATA_SETS: Mapping[str, DataSet] = {
    "wikitext2": DataSet("ggml-org/ci", "wikitext-2-raw-v1.zip", "wikitext-2-raw/wiki.test.raw"),
}


_CHOICES = (
    f"give the path of a UTF-8 text file, or one of the data sets {', '.join(DATA_SETS)}, or leave the argument out"
)


def load_text(source: str | Path | None = None) -> Text:
    """The text of a UTF-8 file, of a data set named in `DATA_SETS`, or, for None, the built-in one.

    The built-in text is `pydoc_data.topics`, the reference prose (some 460 KB) that CPython carries; it
    differs a little between Python versions, so its name says which. Only a data set needs the network, the
    first time. Raises InputError for a file that is missing, unreadable, not UTF-8 or empty, and for a data
    set that cannot be reached.
    """
    if source is None:
        return built_in()
    if not str(source):
        raise InputError(f"the name of the text is empty; {_CHOICES}")
    path = Path(source)
    if not path.exists() and str(source) in DATA_SETS:
        return _download(str(source))
    return _read(path)


def built_in() -> Text:
    """The reference prose of this CPython."""
    topics = pydoc_data.topics.topics
    return Text.of(f"pydoc_data.topics of Python {platform.python_version()}", "\n".join(topics.values()))


def _read(path: Path) -> Text:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"text {str(path)!r} cannot be read ({error.strerror or error}); {_CHOICES}") from error
    return Text.of(path.name, _decode(content, str(path)))


def _decode(content: bytes, name: str) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"text {name!r} is not UTF-8 (byte {error.start} is 0x{content[error.start]:02x}); save it as UTF-8"
        ) from error
    if not text.strip():
        raise InputError(f"text {name!r} is empty; give a file with text to measure on")
    return text


def _download(name: str) -> Text:
    data_set = DATA_SETS[name]
    try:
        archive = huggingface_hub.hf_hub_download(data_set.repository, data_set.archive, repo_type="dataset")
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise InputError(
            f"data set {name!r} ({data_set.repository} on the Hugging Face Hub) cannot be reached: "
            f"{str(error).partition(chr(10))[0] or type(error).__name__}; connect to the network, or give a "
            "text file, or nothing for the built-in text"
        ) from error
    try:
        with zipfile.ZipFile(archive) as files:
            content = files.read(data_set.member)
    except (zipfile.BadZipFile, KeyError) as error:
        raise InputError(
            f"data set {name!r} came without {data_set.member} ({error}); delete {archive} and try again, "
            "or give a text file"
        ) from error
    return Text.of(name, _decode(content, name))
