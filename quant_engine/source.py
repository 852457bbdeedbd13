"""Where a model comes from: a local folder or a repository on the Hugging Face Hub, checked before it is used."""

import difflib
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from quant_engine.errors import (
    CorruptCheckpointError,
    SourceError,
    UnsafeModelError,
    UnsupportedModelError,
)
from quant_engine.manifest import Manifest
from quant_engine.progress import Progress, silent
from quant_engine.safetensors_file import TensorInfo, read_header

INDEX = "model.safetensors.index.json"
ALLOWED_FILES = (
    "config.json", "generation_config.json", "model*.safetensors", INDEX, "README.md",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tokenizer.model.v*", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.tiktoken",
    "chat_template.json", "chat_template.jinja", "additional_chat_templates/*.jinja",
)  # fmt: skip
"""What is fetched from a repository: weights, tokenizer, settings and card. Never code, never pickles."""

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@dataclass(frozen=True)
class Source:
    """A model that was found and whose files are whole.

    path: its folder. name: for people. repo and revision (a commit): where it came from the Hub. config:
    config.json as it is. tensors: by name, from headers that were checked.
    """

    path: Path
    name: str
    repo: str | None
    revision: str | None
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @property
    def shards(self) -> tuple[Path, ...]:
        """The safetensors files."""
        return tuple(dict.fromkeys(info.path for info in self.tensors.values()))

    @property
    def size_bytes(self) -> int:
        """Bytes of the safetensors files."""
        return sum(shard.stat().st_size for shard in self.shards)

    @property
    def eos_token_id(self) -> int | list[int] | None:
        """The tokens that end a text: generation_config.json's where it names any, otherwise config.json's."""
        settings = self.path / "generation_config.json"
        stated = read_json(settings).get("eos_token_id") if settings.is_file() else None
        return self.config.get("eos_token_id") if stated is None else stated

    @cached_property
    def content_sha256(self) -> str | None:
        """A hash of a local model's config.json and weights (names and contents); None where a commit names them."""
        if self.repo is not None:
            return None
        total = hashlib.sha256()
        for file in sorted({self.path / "config.json", *self.shards}):
            total.update(f"{file.name} {file_sha256(file)}\n".encode())
        return total.hexdigest()

    def origin(self) -> dict[str, str | None]:
        """Name, commit and content hash, as a manifest records them."""
        return {"name": self.repo or self.name, "revision": self.revision, "content_sha256": self.content_sha256}


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
        raise SourceError(f"no model at {ref}{_near(folder)}; give a folder, or a Hub repository as owner/name")
    path, commit = _download(ref, revision, progress)
    return open_folder(path, repo=ref, revision=commit)


def is_repository(ref: str) -> bool:
    """Whether `ref` names a Hub repository: "owner/name", and no local file or folder of that name exists."""
    return bool(_REPOSITORY.fullmatch(ref)) and not Path(ref).exists()


def open_folder(folder: Path, *, repo: str | None = None, revision: str | None = None) -> Source:
    """The model in a folder, its files checked. Raises as `resolve` does."""
    if not folder.is_dir():
        raise SourceError(f"{folder} is a file; give the folder that holds config.json and *.safetensors")
    check_files([file.name for file in folder.iterdir()], str(folder))
    config = read_json(folder / "config.json")
    check_no_code(config, "config.json")
    if (folder / "tokenizer_config.json").exists():
        check_no_code(read_json(folder / "tokenizer_config.json"), "tokenizer_config.json")
    tensors = _tensors(folder)
    manifest = Manifest.from_config(config)
    if manifest is not None:
        manifest.check_tensors({name: (info.dtype, info.shape) for name, info in tensors.items()})
    return Source(folder, repo or folder.resolve().name, repo, revision, config, tensors)


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
    if "config.json" not in names:
        raise SourceError(f"{where} has weights but no config.json; copy it from the model's repository")


def _is_weights(name: str) -> bool:
    return name.startswith("model") and name.endswith(".safetensors")


def _explain_no_weights(names: list[str], where: str) -> None:
    def ending(*suffixes: str) -> str:
        return next((name for name in sorted(names) if name.lower().endswith(suffixes)), "")

    if any(name in ("adapter_config.json", "adapter_model.safetensors", "adapters.safetensors") for name in names):
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


def _tensors(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of a folder, checked against its index if it has one."""
    listed = _index(folder)
    files = sorted(set(listed.values())) or sorted(f.name for f in folder.iterdir() if _is_weights(f.name))
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        if not (folder / file).is_file():
            raise CorruptCheckpointError(f"{INDEX} lists {file}, which is missing; download it again")
        for name, info in read_header(folder / file).items():
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


def _near(missing: Path) -> str:
    """Names in the nearest folder that exists which look like the missing one."""
    parent = missing.absolute().parent
    if not parent.is_dir():
        return f" (there is no folder {parent} either)"
    folders = [entry.name for entry in parent.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    near = difflib.get_close_matches(missing.name, folders, n=3, cutoff=0.4)
    return f" (did you mean {', '.join(str(parent / name) for name in near)}?)" if near else ""


def hub_listing(repo: str, revision: str | None) -> tuple[str, dict[str, int]]:
    """The commit that `revision` stands for, and the sizes in bytes of a repository's files by name.

    Raises SourceError where it cannot be reached or does not exist, ConnectionError without network.
    """
    try:
        info = huggingface_hub.model_info(repo, revision=revision, files_metadata=True)
    except GatedRepoError as error:
        raise SourceError(f"{repo} needs its licence accepted on its page, then `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise SourceError(f"{repo} has no revision {revision!r}; give a branch, tag or commit of it") from error
    except RepositoryNotFoundError as error:
        raise SourceError(
            f"no repository {repo} on the Hub, or it is private (`hf auth login`), and no folder of "
            f"that name{_near(Path(repo))}; check the spelling"
        ) from error
    except HFValidationError as error:
        raise SourceError(f"{repo!r} is no repository name: {error}") from error
    except OfflineModeIsEnabled as error:
        raise ConnectionError(str(error)) from error
    except HfHubHTTPError as error:
        raise SourceError(f"the Hub answered for {repo}: {error}; try again later") from error
    except Exception as error:
        if _is_network(error):
            raise ConnectionError(str(error)) from error
        raise
    return cast(str, info.sha), {file.rfilename: file.size or 0 for file in info.siblings or []}


def _is_network(error: BaseException) -> bool:
    """Connection and time-out errors of the HTTP client that huggingface_hub uses, whichever that is."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, OSError) or bool(kinds & {"TransportError", "ConnectionError", "Timeout"})


def _download(repo: str, revision: str | None, progress: Progress) -> tuple[Path, str]:
    """The folder and commit of a repository in Hugging Face's cache, fetched if need be."""
    try:
        commit, files = hub_listing(repo, revision)
    except ConnectionError as error:
        return _cached(repo, revision, error, progress)
    check_files(list(files), repo)
    progress(0, 1, f"downloading {repo} at {commit[:12]}")
    try:
        path = Path(huggingface_hub.snapshot_download(repo, revision=commit, allow_patterns=list(ALLOWED_FILES)))
    except (OSError, HfHubHTTPError) as error:
        raise SourceError(f"the download of {repo} stopped: {error}; run it again, it continues") from error
    progress(1, 1, f"downloaded {repo}")
    return path, commit


def _cached(repo: str, revision: str | None, offline: ConnectionError, progress: Progress) -> tuple[Path, str]:
    try:
        path = Path(
            huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=list(ALLOWED_FILES), local_files_only=True
            )
        )
    except (LocalEntryNotFoundError, FileNotFoundError) as error:
        raise SourceError(
            f"no folder {repo}{_near(Path(repo))}, and the Hub cannot be reached ({offline}); connect, set "
            "HF_ENDPOINT to a mirror, or give the path of a folder that was downloaded before"
        ) from error
    progress(1, 1, f"no network: using the copy of {repo} downloaded before")
    return path, path.name
