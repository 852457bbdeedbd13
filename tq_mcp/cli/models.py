"""`tq-mcp models ls`, `show`, `verify` and `rm`."""

import argparse

from tq_mcp.cli import output
from tq_mcp.cli.run import run_command


def run(arguments: argparse.Namespace) -> int:
    if arguments.action == "show":
        return run_command(arguments, lambda services, _: services.get_model(arguments.name), output.model_details)
    if arguments.action == "verify":
        return run_command(
            arguments, lambda services, report: services.verify_model(arguments.name, report), output.verification
        )
    if arguments.action == "rm":
        return run_command(
            arguments,
            lambda services, _: services.remove_model(arguments.name, force=arguments.force, dry_run=not arguments.yes),
            output.removal,
        )
    return run_command(
        arguments,
        lambda services, _: services.list_models(arguments.filters, arguments.sort, arguments.limit, arguments.cursor),
        output.model_list,
    )
