"""Text that a model or a stranger wrote, made safe to show: it may hold anything."""

import unicodedata

KEPT = "\n\t"
REORDERING = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
MAX_CHARACTERS = 50_000


def clean(text: str, limit: int = MAX_CHARACTERS) -> str:
    """The text without control characters, escape sequences' starts, invisible tags and changes of writing
    direction, cut to `limit` characters."""
    shown = "".join(character for character in text if _is_harmless(character))
    return shown if len(shown) <= limit else shown[:limit] + f"... [cut, {len(shown):,} characters in all]"


def _is_harmless(character: str) -> bool:
    if character in KEPT:
        return True
    is_tag = 0xE0000 <= ord(character) <= 0xE007F
    return unicodedata.category(character) not in ("Cc", "Cs") and character not in REORDERING and not is_tag


def is_text(given: str) -> bool:
    """Whether what came from outside was UTF-8: other bytes are surrogates in Python's strings."""
    return not any("\ud800" <= letter <= "\udfff" for letter in given)
