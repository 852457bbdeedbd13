"""`tq-mcp doctor`."""

import argparse

from tq_mcp.cli import output
from tq_mcp.doctor import diagnose
from tq_mcp.settings import Settings


def run(arguments: argparse.Namespace) -> int:
    """Exit code 1 where something is missing."""
    found = diagnose(Settings.read(arguments.home))
    output.print_result(found, arguments.json, output.diagnosis)
    return 1 if found.problems else 0
