"""Where things are under the home folder, and which names and places a model may have."""

import re
from dataclasses import dataclass
from pathlib import Path

from registry.errors import RegistryError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


@dataclass(frozen=True)
class Layout:
    """`home` is resolved. Paths inside the models root are stored relative to it, so it may move."""

    home: Path

    @property
    def database(self) -> Path:
        return self.home / "registry.sqlite"

    @property
    def lock(self) -> Path:
        """Held while rows and folders change together."""
        return self.home / "registry.lock"

    @property
    def backups(self) -> Path:
        return self.home / "backups"

    @property
    def models(self) -> Path:
        return self.home / "models"

    @property
    def staging(self) -> Path:
        return self.models / ".staging"

    def create(self) -> None:
        try:
            self.staging.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RegistryError(
                f"The home folder {self.home} cannot be used: {error.strerror}. Choose another."
            ) from error

    def final(self, name: str, chosen: Path | None = None) -> Path:
        """The folder of a model: the user's choice outside the models root, else MODELS/NAME."""
        check_name(name, "a model name")
        place = self.models / name if chosen is None else absolute(chosen)
        if place == self.models / name:
            return place
        if place.is_relative_to(self.models) or self.models.is_relative_to(place):
            raise RegistryError(
                f"{place} is not a place for the model {name!r}: inside {self.models} its folder has its "
                "name. Leave the folder out, or choose one elsewhere."
            )
        return place

    def is_external(self, place: Path) -> bool:
        return not place.is_relative_to(self.models)

    def stored(self, place: Path) -> str:
        return str(place) if self.is_external(place) else place.relative_to(self.models).as_posix()

    def path(self, stored: str) -> Path:
        return self.models / stored


def overlap(one: Path, other: Path) -> bool:
    """Whether two folders are the same, or one lies in the other."""
    return one.is_relative_to(other) or other.is_relative_to(one)


def absolute(path: Path) -> Path:
    """With `~` expanded and the links of the parent folders resolved, but not the last name's."""
    expanded = path.expanduser()
    return expanded.parent.resolve() / expanded.name


def check_name(name: str, what: str) -> None:
    if not NAME.fullmatch(name):
        raise RegistryError(
            f"{name!r} is not {what}. Use 1 to 96 letters, digits, '.', '_' and '-', beginning with a letter or digit."
        )
