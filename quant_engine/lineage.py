"""Which arrays an array is to be computed from, as MLX's graph has it before anything is computed."""

import io
import re
from collections.abc import Mapping
from typing import Any, cast

import mlx.core as mx

_EDGE = re.compile(r'"?([^"\n]+?)"? -> "?([^"\n]+?)"?')
_AT_ONCE = 500
"""Arrays that are named in one drawing; MLX's binding takes 1024 names."""


def lineage(made: Mapping[str, mx.array], given: Mapping[str, mx.array]) -> dict[str, set[str]]:
    """The names of those of `given` that each of `made` needs; no array may be in both.

    given: at most 500 arrays, made by an operation that is not carried out. Where one has been carried out meanwhile,
    the graph no longer shows who needs what, and each of `made` is said to need all.
    """
    sources = {f"given {name}": array for name, array in given.items()}
    nodes = {f"made {id(array)}": array for array in made.values()}
    roots: dict[str, set[str]] = {}
    for start in range(0, len(nodes), _AT_ONCE):
        part = list(nodes)[start : start + _AT_ONCE]
        parents = _parents({node: nodes[node] for node in part} | sources)
        if sources.keys() - parents.keys():
            return {name: set(given) for name in made}
        roots |= {node: _roots(node, parents) for node in part}
    return {name: roots[f"made {id(array)}"] for name, array in made.items()}


def _parents(named: Mapping[str, mx.array]) -> dict[str, set[str]]:
    """The nodes before each node of the graph: arrays by name, or by a letter, and operations by number."""
    text = io.StringIO()
    cast(Any, mx).export_to_dot(text, **named)
    parents: dict[str, set[str]] = {}
    for line in text.getvalue().splitlines():
        if edge := _EDGE.fullmatch(line):
            parents.setdefault(edge[2], set()).add(edge[1])
    return parents


def _roots(node: str, parents: Mapping[str, set[str]]) -> set[str]:
    found: set[str] = set()
    seen, left = {node}, [node]
    while left:
        for parent in parents.get(left.pop(), ()):
            if parent.startswith("given "):
                found.add(parent.removeprefix("given "))
            elif parent not in seen:
                seen.add(parent)
                left.append(parent)
    return found
