"""`tq-mcp models ls` and `tq-mcp models show`."""

import argparse

from tq_mcp.cli import output
from tq_mcp.cli.run import run_command


def run(arguments: argparse.Namespace) -> int:
    if arguments.action == "show":
        return run_command(arguments, lambda services, _: services.get_model(arguments.name), output.model_details)
    return run_command(
        arguments,
        lambda services, _: services.list_models(arguments.filters, arguments.sort, arguments.limit, arguments.cursor),
        output.model_list,
    )
