"""What a user means by a model: a registry name, a folder or a repository."""

from dataclasses import dataclass
from pathlib import Path

from quant_engine.errors import InputError, SourceError
from quant_engine.source import is_repository
from registry import Model, Registry, RegistryError


@dataclass(frozen=True)
class Located:
    """ref: folder or repository for the engine. model: its record, where it is registered."""

    ref: str | Path
    name: str
    model: Model | None

    @property
    def source(self) -> str:
        """How records name it: an absolute path, or a repository."""
        return str(self.ref)


def locate(registry: Registry, ref: str, revision: str | None = None) -> Located:
    """Find a model by registry name or alias first, then folder, then repository ("owner/name").

    Raises SourceError, naming similar registered models, for what can be none of these, and InputError for a
    revision of what is no repository.
    """
    found = _locate(registry, ref)
    if revision is not None and isinstance(found.ref, Path):
        raise InputError(
            f"revision is {revision!r}, and {found.ref} is a folder, which has none; leave revision out, or give a "
            "repository as owner/name"
        )
    return found


def _locate(registry: Registry, ref: str) -> Located:
    try:
        folder = Path(ref).expanduser()
        exists = folder.exists()
    except (OSError, RuntimeError) as error:  # a name too long, a home of nobody, a folder that may not be read
        raise SourceError(f"{ref!r} cannot be a folder ({getattr(error, 'strerror', None) or error})") from error
    is_plain = "/" not in ref and "\\" not in ref and not ref.startswith(("~", "."))
    if is_plain and (model := registry.find(ref)):
        return Located(model.path, model.name, model)
    if exists:
        return Located(folder.resolve(), folder.resolve().name, _registered(registry, folder.resolve()))
    if is_plain:
        raise SourceError(
            f"{_not_registered(registry, ref)} There is no folder {ref!r} here either, and a "
            "repository is written owner/name."
        )
    return Located(ref if is_repository(ref) else folder.absolute(), ref, None)


def _registered(registry: Registry, folder: Path) -> Model | None:
    """The registered model whose folder this is."""
    return next((model for model in registry.overlapping(folder) if model.path == folder), None)


def _not_registered(registry: Registry, name: str) -> str:
    try:
        registry.get(name)
    except RegistryError as error:
        return str(error)
    return f"The folder of the model {name!r} is gone."
