"""`tq-mcp push`."""

import argparse

from tq_mcp.cli import output
from tq_mcp.cli.run import run_command


def run(arguments: argparse.Namespace) -> int:
    return run_command(
        arguments,
        lambda services, _: services.push(
            arguments.model, arguments.repo, private=arguments.private, dry_run=not arguments.yes
        ),
        output.push,
    )
