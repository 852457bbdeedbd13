"""Expected failures of every package, and which tool to call after each."""

from metal_kernels import KernelError
from quant_engine.errors import (
    DownloadError,
    InputError,
    OutputError,
    RecipeError,
    SourceError,
    TurboQuantError,
)
from registry import RegistryError

EXPECTED = (TurboQuantError, KernelError, RegistryError)
"""Exceptions whose text is fit for a user or an agent."""

_NEXT: tuple[tuple[type[Exception], str], ...] = (
    (DownloadError, "call the same tool with the same arguments again, it goes on from where it stopped"),
    (SourceError, "list_models shows what is registered"),
    (RecipeError, "plan_conversion shows which widths fit a model before it is converted"),
    (OutputError, "plan_conversion shows sizes and what fits"),
    (InputError, "call the same tool again with the value corrected"),
    (RegistryError, "list_models shows the names and what can be filtered and sorted"),
    (TurboQuantError, "plan_conversion checks another model in seconds"),
)


def explain(error: Exception) -> str:
    """What happened and what to do, for an agent."""
    advice = next((text for kind, text in _NEXT if isinstance(error, kind)), "")
    text = describe(error)
    return f"{text} Next: {advice}." if advice else text


def describe(error: Exception) -> str:
    """An expected failure in one paragraph that ends with a full stop."""
    text = str(error).strip()
    if text.partition(" ")[0].isalpha():
        text = text[0].upper() + text[1:]
    return text if text.endswith((".", "?", "!")) else f"{text}."
