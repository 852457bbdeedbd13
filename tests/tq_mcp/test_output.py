import pytest

from tq_mcp.cli import output


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (None, "–"),
        (0, "0 B"),
        (999, "999 B"),
        (7_348_736, "7.35 MB"),
        (25_300_000_000, "25.3 GB"),
        (10**15, "1e+03 TB"),
    ],
)
def test_sizes_are_in_powers_of_a_thousand(count: int | None, shown: str) -> None:
    assert output.size(count) == shown


def test_what_was_not_measured_is_a_dash() -> None:
    assert (output.number(None), output.share(None)) == ("–", "–")


def test_long_text_becomes_one_short_line() -> None:
    assert output.one_line("a\nb  c", 10) == "a b c"
    assert output.one_line("abcdef", 4) == "abc…"


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.2, "1 s"), (89, "89 s"), (600, "10 min"), (5400, "1.5 h"), (86_400, "24.0 h")]
)
def test_durations_are_rounded_to_what_matters(seconds: float, shown: str) -> None:
    assert output.duration(seconds) == shown
