"""`tq-mcp serve`."""

import argparse

from tq_mcp.server import serve
from tq_mcp.settings import Settings


def run(arguments: argparse.Namespace) -> int:
    """Serve until the client goes."""
    serve(Settings.read(arguments.home))
    return 0
