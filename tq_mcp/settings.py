"""Settings, and the only place that reads the environment."""

import os
from dataclasses import dataclass
from pathlib import Path

HOME_VARIABLE = "TQ_HOME"
DEFAULT_HOME = Path("~/.tq-mcp")


class SettingsError(Exception):
    """A setting that cannot be used, in words."""


@dataclass(frozen=True)
class Settings:
    """home: the absolute folder of models and registry."""

    home: Path

    @classmethod
    def read(cls, home: str | Path | None = None) -> "Settings":
        """The settings in force: `home` where given, otherwise TQ_HOME, otherwise ~/.tq-mcp. Raises SettingsError."""
        chosen = home or os.environ.get(HOME_VARIABLE) or DEFAULT_HOME
        try:
            return cls(Path(chosen).expanduser().absolute())
        except RuntimeError as error:
            raise SettingsError(f"{HOME_VARIABLE} is {str(chosen)!r}, and there is no such user's home") from error


def child_environment(**changes: str) -> dict[str, str]:
    """This process's environment for a child, with changes."""
    return {**os.environ, **changes}
