"""Where a model comes from: a local folder or a repository on the Hugging Face Hub, checked before it is used."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import huggingface_hub
from huggingface_hub.errors import LocalEntryNotFoundError

from quant_engine.errors import (
    CorruptCheckpointError,
    SourceError,
    UnsafeModelError,
    UnsupportedModelError,
)
from quant_engine.file_hash import file_sha256
from quant_engine.manifest import Manifest
from quant_engine.near import near
from quant_engine.progress import Progress, silent
from quant_engine.repository import Repository
from quant_engine.safetensors_file import TensorInfo, read_header
from quant_engine.tokenizer_files import VOCABULARIES

INDEX = "model.safetensors.index.json"
WEIGHTS = "model*.safetensors"
SMALL_FILES = (
    "config.json", "generation_config.json", INDEX, "README.md", *VOCABULARIES, "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "merges.txt",
    "chat_template.json", "chat_template.jinja", "additional_chat_templates/*.jinja",
)  # fmt: skip
"""What is fetched from a repository beside its weights: tokenizer, settings and card."""

ALLOWED_FILES = (WEIGHTS, *SMALL_FILES)
"""What is fetched from a repository at all. Never code, never pickles."""

Headers = Callable[[Sequence[str]], Mapping[str, Mapping[str, TensorInfo]]]
"""Gives the tensors of safetensors files by file and name."""

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapters.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@dataclass(frozen=True)
class Source:
    """A model that was found and whose files are whole.

    path: its folder. name: for people. repo and revision (a commit): where it came from the Hub. config:
    config.json as it is. tensors: by name, from headers that were checked. repository: where weights that are not
    on this machine can be fetched, None where all are here.
    """

    path: Path
    name: str
    repo: str | None
    revision: str | None
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    repository: Repository | None = None

    @property
    def shards(self) -> tuple[Path, ...]:
        """The safetensors files."""
        return tuple(self.shard_bytes)

    @cached_property
    def shard_bytes(self) -> dict[Path, int]:
        """Bytes of each of the safetensors files, on this machine or not."""
        sizes: dict[Path, int] = {}
        for info in self.tensors.values():
            sizes[info.path] = max(info.end, sizes.get(info.path, 0))
        return sizes

    @property
    def missing(self) -> dict[Path, int]:
        """Those that are not on this machine now, with their bytes."""
        return {path: size for path, size in self.shard_bytes.items() if not path.exists()}

    @property
    def size_bytes(self) -> int:
        """Bytes of the safetensors files."""
        return sum(self.shard_bytes.values())

    @property
    def eos_token_id(self) -> int | list[int] | None:
        """The tokens that end a text: generation_config.json's where it names any, otherwise config.json's."""
        settings = self.path / "generation_config.json"
        stated = read_json(settings).get("eos_token_id") if settings.is_file() else None
        return self.config.get("eos_token_id") if stated is None else stated

    @property
    def content_files(self) -> list[Path]:
        """A local model's config.json and weights; none where a commit names them."""
        return [] if self.repo is not None else sorted({self.path / "config.json", *self.shards})

    @cached_property
    def content_sha256(self) -> str | None:
        """A hash of `content_files`, names and contents; None where there are none."""
        return self.content_hash(map(file_sha256, self.content_files))

    def content_hash(self, hashes: Iterable[str]) -> str | None:
        """`content_sha256` from the hash of each of `content_files`."""
        if not self.content_files:
            return None
        total = hashlib.sha256()
        for file, sha256 in zip(self.content_files, hashes, strict=True):
            total.update(f"{file.name} {sha256}\n".encode())
        return total.hexdigest()

    def identity(self) -> dict[str, Any]:
        """What stands for the content without reading it: the commit, or for each of `content_files` its size and
        the times of its last change, beside what the headers say.

        Whatever writes to a file or sets its time back changes st_ctime, which nothing sets back; moving its folder
        does not.
        """
        files = {file.name: file.stat() for file in self.content_files}
        tensors = [(t.path.name, t.name, t.dtype, t.shape, t.start) for t in self.tensors.values()]
        return {
            "repo": self.repo,
            "revision": self.revision,
            "files": {name: [s.st_size, s.st_mtime_ns, s.st_ctime_ns] for name, s in files.items()},
            "config": self.config,
            "tensors": sorted(tensors),
        }

    def origin(self, hashes: Iterable[str] | None = None) -> dict[str, str | None]:
        """Name, commit and content hash, as a manifest records them; hashes: of `content_files`, if known."""
        content = self.content_sha256 if hashes is None else self.content_hash(hashes)
        return {"name": self.repo or self.name, "revision": self.revision, "content_sha256": content}


def resolve(ref: str | Path, *, revision: str | None = None, progress: Progress = silent) -> Source:
    """Find a model by folder, or by repository ("owner/name", at `revision`, a commit where it must not change).

    A repository is downloaded without any code in it, at the commit that `revision` stands for now; without
    network a copy in Hugging Face's cache is used. Raises SourceError, UnsafeModelError,
    UnsupportedModelError or CorruptCheckpointError, each saying what was found and what to do.
    """
    folder = Path(ref).expanduser()
    if folder.exists():
        return open_folder(folder)
    if isinstance(ref, Path) or not is_repository(ref):
        raise SourceError(f"no model at {ref}{near(folder)}; give a folder, or a Hub repository as owner/name")
    try:
        found = Repository.find(ref, revision)
    except ConnectionError as error:
        return _cached(ref, revision, error, progress)
    check_files(list(found.sizes), ref)
    progress(0, 1, f"downloading {ref} at {found.commit[:12]}")
    path = found.download(ALLOWED_FILES)
    progress(1, 1, f"downloaded {ref}")
    return open_folder(path, repo=ref, revision=found.commit)


def peek(
    ref: str | Path, *, revision: str | None = None, files: Sequence[str] = SMALL_FILES, progress: Progress = silent
) -> Source:
    """As `resolve`, but of a repository's weights only headers are fetched, and of its other files those in `files`.

    The tensors are where Hugging Face's cache has the weights, or would have them: see `Source.repository`.
    """
    if not isinstance(ref, str) or not is_repository(ref):
        return resolve(ref, revision=revision, progress=progress)
    try:
        found = Repository.find(ref, revision)
    except ConnectionError as error:
        return _cached(ref, revision, error, progress)
    check_files(list(found.sizes), ref)
    progress(0, 1, f"reading the headers of {ref} at {found.commit[:12]}")
    folder = found.download(files)
    source = _read(folder, set(found.sizes), lambda shards: found.headers(shards, folder))
    return replace(source, name=ref, repo=ref, revision=found.commit, repository=found)


def is_repository(ref: str) -> bool:
    """Whether `ref` names a Hub repository: "owner/name", and no local file or folder of that name exists."""
    return bool(_REPOSITORY.fullmatch(ref)) and not Path(ref).exists()


def open_folder(folder: Path, *, repo: str | None = None, revision: str | None = None) -> Source:
    """The model in a folder, its files checked. Raises as `resolve` does."""
    if not folder.is_dir():
        if folder.name.lower().endswith((".gguf", *_PICKLES)):
            _explain_no_weights([folder.name], str(folder.parent))
        raise SourceError(f"{folder} is a file; give the folder that holds config.json and *.safetensors")
    check_files([file.name for file in folder.iterdir()], str(folder))
    present = {file.name for file in folder.iterdir() if file.is_file()}
    found = _read(folder, present, lambda shards: {shard: read_header(folder / shard) for shard in shards})
    return replace(found, name=repo or found.name, repo=repo, revision=revision)


def _read(folder: Path, present: set[str], headers: Headers) -> Source:
    """The model in a folder, where the weights named in `present` are, or will be."""
    config = read_json(folder / "config.json")
    check_no_code(config, "config.json")
    if (folder / "tokenizer_config.json").exists():
        check_no_code(read_json(folder / "tokenizer_config.json"), "tokenizer_config.json")
    tensors = _tensors(folder, present, headers)
    manifest = Manifest.from_config(config)
    if manifest is not None:
        manifest.check_tensors({name: (info.dtype, info.shape) for name, info in tensors.items()})
    return Source(folder, folder.resolve().name, None, None, config, tensors)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises CorruptCheckpointError for anything else."""
    try:
        value: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpointError(f"{path.name} is not JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise CorruptCheckpointError(f"{path.name} holds no JSON object; download it again")
    return cast(dict[str, Any], value)


def check_files(names: list[str], where: str) -> None:
    """Raise where the files' names show that this is no model in safetensors form."""
    if not names:
        raise SourceError(f"{where} is empty; give a folder with config.json and model*.safetensors")
    weights = any(_is_weights(name) for name in names)
    if not weights:
        _explain_no_weights(names, where)
    if adapter := next((name for name in names if name in _ADAPTERS), None):
        raise SourceError(
            f"{where} has an adapter ({adapter}) beside the model's weights, which would be left out; merge it first "
            "(mlx_lm.fuse, or PEFT's merge_and_unload), or give a folder without it where it is merged already"
        )
    if "config.json" not in names:
        raise SourceError(f"{where} has weights but no config.json; copy it from the model's repository")


def _is_weights(name: str) -> bool:
    return name.startswith("model") and name.endswith(".safetensors")


def _explain_no_weights(names: list[str], where: str) -> None:
    def ending(*suffixes: str) -> str:
        return next((name for name in sorted(names) if name.lower().endswith(suffixes)), "")

    if any(name in _ADAPTERS for name in names):
        raise SourceError(
            f"{where} holds an adapter, not a model; merge it into its base first (mlx_lm.fuse, or "
            "PEFT's merge_and_unload), then give the merged folder"
        )
    if pickle := ending(*_PICKLES):
        raise UnsafeModelError(
            f"{where} has its weights in {pickle}, a format that can run code when it is opened; "
            "use a repository with safetensors, or save it again with transformers: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(FOLDER)"
        )
    if gguf := ending(".gguf"):
        raise UnsupportedModelError(
            f"{where} has its weights in {gguf}, quantized already for llama.cpp; give the "
            "original model's repository instead"
        )
    if other := ending(".safetensors"):
        raise SourceError(f"{where} has {other} but no model*.safetensors; give the folder of the language model")
    if INDEX in names:
        raise CorruptCheckpointError(f"{where} has {INDEX} and none of its shards; download it again")
    raise SourceError(
        f"{where} holds no model*.safetensors (found {', '.join(sorted(names)[:5])}); give the folder of "
        "a model, or a Hub repository as owner/name"
    )


def check_no_code(config: Mapping[str, Any], name: str) -> None:
    """Raise UnsafeModelError where a config asks for code of its repository to be run."""
    for key in ("auto_map", "model_file", "trust_remote_code"):
        if config.get(key):
            raise UnsafeModelError(
                f"{name} asks for code from the repository to be run ({key}: {config[key]!r}), which "
                "is never done here; use a model of an architecture that mlx-lm has built in"
            )


def _tensors(folder: Path, present: set[str], headers: Headers) -> dict[str, TensorInfo]:
    """All tensors of the files in `present`, checked against the folder's index if it has one."""
    listed = _index(folder)
    files = sorted(set(listed.values())) or sorted(filter(_is_weights, present))
    for file in files:
        if file not in present:
            raise CorruptCheckpointError(f"{INDEX} lists {file}, which is missing; download it again")
    tensors: dict[str, TensorInfo] = {}
    for file, held in headers(files).items():
        for name, info in held.items():
            if name in tensors:
                raise CorruptCheckpointError(
                    f"tensor {name} is in {tensors[name].path.name} and in {file}; download the model again"
                )
            tensors[name] = info
    for name, file in listed.items():
        if name not in tensors or tensors[name].path.name != file:
            raise CorruptCheckpointError(
                f"{INDEX} says that tensor {name} is in {file}, and it is not; download the model again"
            )
    return tensors


def _index(folder: Path) -> dict[str, str]:
    if not (folder / INDEX).exists():
        return {}
    listed: Any = read_json(folder / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CorruptCheckpointError(f"{INDEX} has no weight_map; download it again")
    for file in cast(dict[str, Any], listed).values():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise CorruptCheckpointError(f"{INDEX} names the shard {file!r}; it must be a safetensors file beside it")
    return cast(dict[str, str], listed)


def _cached(repo: str, revision: str | None, offline: ConnectionError, progress: Progress) -> Source:
    """The copy of a repository in Hugging Face's cache."""
    advice = "connect, set HF_ENDPOINT to a mirror, or give the path of a folder that was downloaded before"
    cannot = f"the Hub cannot be reached ({offline}); {advice}"
    try:
        path = Path(
            huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=list(ALLOWED_FILES), local_files_only=True
            )
        )
    except (LocalEntryNotFoundError, FileNotFoundError) as error:
        raise SourceError(f"no folder {repo}{near(Path(repo))}, and {cannot}") from error
    try:
        found = open_folder(path, repo=repo, revision=path.name)
    except (SourceError, CorruptCheckpointError) as error:
        raise SourceError(f"the copy of {repo} on this machine is not whole ({error}), and {cannot}") from error
    progress(1, 1, f"no network: using the copy of {repo} downloaded before")
    return found
