"""Functions and classes that see other values under some global names; the originals stay as they are."""

from collections.abc import Mapping
from types import FunctionType
from typing import Any


def rebound(function: FunctionType, replaced: Mapping[str, Any]) -> FunctionType:
    """A copy of a function that sees these values under these global names."""
    copy = FunctionType(
        function.__code__,
        {**function.__globals__, **replaced},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def rebound_class(kind: type, routes: Mapping[str, tuple[Any, Any]]) -> type:
    """A subclass whose own methods see the second of a pair where the class's module has the first under that name.

    The class itself where none of its methods names one.
    """
    methods: dict[str, FunctionType] = {}
    for name, function in vars(kind).items():
        if isinstance(function, FunctionType):
            replaced = {
                target: ours
                for target, (theirs, ours) in routes.items()
                if target in function.__code__.co_names and function.__globals__.get(target) is theirs
            }
            if replaced:
                methods[name] = rebound(function, replaced)
    return type(kind.__name__, (kind,), methods) if methods else kind
