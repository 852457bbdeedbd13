"""Names like one that is missing."""

import difflib
from pathlib import Path


def near(missing: Path) -> str:
    """Folders like the missing one where it should be, in brackets; nothing where there are none."""
    parent = missing.absolute().parent
    if not parent.is_dir():
        return f" (there is no folder {parent} either)"
    folders = [entry.name for entry in parent.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    like = difflib.get_close_matches(missing.name, folders, n=3, cutoff=0.4)
    return f" (did you mean {', '.join(str(parent / name) for name in like)}?)" if like else ""
