"""A small trained Llama that ships with the package, so that a demonstration needs no download."""

from pathlib import Path


def path() -> Path:
    """Return the folder that holds the demo model, in the layout of a Hugging Face checkpoint."""
    return Path(__file__).resolve().parent
