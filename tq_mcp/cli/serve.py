"""`tq-mcp serve`."""

import argparse

from tq_mcp.server import create_server
from tq_mcp.settings import Settings


def run(arguments: argparse.Namespace) -> int:
    """Serve until the client goes. The SDK keeps stray output off stdout, which belongs to the protocol."""
    create_server(Settings.read(arguments.home)).run("stdio")
    return 0
