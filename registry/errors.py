"""The one exception that callers of the registry handle."""


class RegistryError(Exception):
    """An expected failure: the text says what was given, what is allowed and what to do next."""
