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
    (
        RecipeError,
        "call the same tool again with the value corrected; plan_conversion tells in seconds whether it fits",
    ),
    (OutputError, "plan_conversion shows sizes and what fits"),
    (InputError, "call the same tool again with the value corrected"),
    (KernelError, "call the same tool again with the value corrected"),
    (RegistryError, "list_models shows the names and what can be filtered and sorted"),
    (TurboQuantError, "plan_conversion checks another model in seconds"),
    (OSError, "see to what the machine lacks, then call the same tool again"),
    (MemoryError, "choose a smaller model or fewer tokens, plan_conversion shows what fits"),
    (Exception, "call the same tool with other values or another model; the server's log on stderr has the traceback"),
)


def explain(error: Exception) -> str:
    """What happened and what to do, for an agent, of any exception."""
    advice = next((text for kind, text in _NEXT if isinstance(error, kind)), "")
    text = describe(error)
    return f"{text} Next: {advice}." if advice else text


def describe(error: Exception) -> str:
    """A failure in one paragraph that ends with a full stop; one that nobody expected with its type."""
    text = str(error).strip()
    if not isinstance(error, EXPECTED):
        machine = isinstance(error, OSError | MemoryError)
        text = f"{'the machine refused' if machine else 'it failed'}: {type(error).__name__}: {text}"
    if text.partition(" ")[0].isalpha():
        text = text[0].upper() + text[1:]
    return text if text.endswith((".", "?", "!")) else f"{text}."
