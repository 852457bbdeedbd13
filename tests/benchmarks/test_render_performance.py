"""The page's tables are those of the results."""

from benchmarks.render_performance import PAGE, render


def test_the_page_shows_what_was_measured() -> None:
    page = PAGE.read_text()
    assert render(page) == page
    assert page.count("### ") > 3
