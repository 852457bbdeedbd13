import pytest

from tq_mcp.untrusted import clean


def test_plain_text_in_any_script_stays() -> None:
    text = "Zeile 1\n\tžluťoučký 読む 👩‍🔬 ∑x²"
    assert clean(text) == text


@pytest.mark.parametrize(
    "bad",
    ["\x1b", "\x00", "\r", "\x9b", "\u202e", "\u2066", "\U000e0041", "\ud800", "\x7f"],
    ids=lambda bad: f"U+{ord(bad):04X}",
)
def test_what_steers_terminals_or_hides_text_goes(bad: str) -> None:
    assert clean(f"a{bad}b") == "ab"


def test_long_text_is_cut_and_says_so() -> None:
    assert clean("x" * 50, 10) == "x" * 10 + "... [cut, 50 characters in all]"
