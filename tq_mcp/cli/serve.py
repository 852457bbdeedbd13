"""`tq-mcp serve`."""

import argparse
import logging

from tq_mcp.server import create_server
from tq_mcp.settings import Settings


def run(arguments: argparse.Namespace) -> int:
    """Serve until the client goes. The SDK keeps stray output off stdout, which belongs to the protocol."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    create_server(Settings.read(arguments.home)).run("stdio")
    return 0
