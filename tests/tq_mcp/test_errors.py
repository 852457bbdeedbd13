import pytest

from quant_engine.errors import InputError, RecipeError, SourceError, UnsafeModelError
from registry import RegistryError
from tq_mcp.errors import EXPECTED, describe, explain


@pytest.mark.parametrize(
    ("error", "tool"),
    [
        (SourceError("no model at x"), "list_models"),
        (RecipeError("bits is 9"), "plan_conversion"),
        (UnsafeModelError("asks for code"), "plan_conversion"),
        (RegistryError("There is no model 'x'."), "list_models"),
        (InputError("the prompt is empty"), "same tool"),
        (OSError(28, "No space left on device"), "same tool"),
        (ZeroDivisionError("division by zero"), "stderr"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_agent_is_told_what_to_call_next(error: Exception, tool: str) -> None:
    text = explain(error)
    assert str(error)[1:] in text
    assert tool in text.partition("Next:")[2]


def test_a_failure_that_nobody_expected_says_its_type() -> None:
    assert describe(KeyError("x")) == "It failed: KeyError: 'x'."
    assert describe(MemoryError("0 bytes")) == "The machine refused: MemoryError: 0 bytes."


def test_every_expected_failure_reads_as_a_sentence() -> None:
    assert describe(RecipeError("bits is 9; choose 2")) == "Bits is 9; choose 2."
    assert describe(RegistryError("It is taken.")) == "It is taken."
    assert describe(SourceError("no model (did you mean a?)")) == "No model (did you mean a?)."


def test_names_of_tensors_keep_their_spelling() -> None:
    assert describe(RecipeError("model.layers.0: too wide")) == "model.layers.0: too wide."


def test_failures_of_all_packages_are_expected() -> None:
    assert {kind.__name__ for kind in EXPECTED} == {"TurboQuantError", "KernelError", "RegistryError"}
