"""Settings, and the only place that reads the environment."""

import os
from dataclasses import dataclass
from pathlib import Path

HOME_VARIABLE = "TQ_HOME"
DEFAULT_HOME = Path("~/.tq-mcp")


@dataclass(frozen=True)
class Settings:
    """home: the absolute folder of models and registry."""

    home: Path

    @classmethod
    def read(cls, home: str | Path | None = None) -> "Settings":
        """The settings in force: `home` where given, otherwise TQ_HOME, otherwise ~/.tq-mcp."""
        chosen = home or os.environ.get(HOME_VARIABLE) or DEFAULT_HOME
        return cls(Path(chosen).expanduser().absolute())


def child_environment(**changes: str) -> dict[str, str]:
    """This process's environment for a child, with changes."""
    return {**os.environ, **changes}
