"""`tq-mcp plan`."""

import argparse

from tq_mcp.cli import output
from tq_mcp.cli.parser import module_widths
from tq_mcp.cli.run import run_command


def run(arguments: argparse.Namespace) -> int:
    return run_command(
        arguments,
        lambda services, progress: services.plan(
            arguments.model,
            bits=arguments.bits,
            group_size=arguments.group_size,
            context=arguments.context,
            use_qjl=arguments.use_qjl,
            fold_rotation=arguments.fold_rotation,
            widths=module_widths(arguments),
            keep_unfitting=arguments.keep_unfitting,
            revision=arguments.revision,
            progress=progress,
        ),
        output.plan,
    )
