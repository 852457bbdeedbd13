"""`tq-mcp doctor`."""

import argparse

from tq_mcp.cli import output
from tq_mcp.doctor import diagnose
from tq_mcp.settings import Settings


def run(arguments: argparse.Namespace) -> int:
    """Exit code 1 where something is missing."""
    found = diagnose(Settings.read(arguments.home))
    if arguments.json:
        print(found.model_dump_json(indent=2))
    else:
        output.console().print(output.diagnosis(found))
    return 1 if found.problems else 0
