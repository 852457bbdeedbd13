"""`tq-mcp export`."""

import argparse

from tq_mcp.cli import output
from tq_mcp.cli.run import run_command


def run(arguments: argparse.Namespace) -> int:
    return run_command(
        arguments,
        lambda services, progress: services.export(
            arguments.model,
            arguments.output,
            form=arguments.form,
            bits=arguments.bits,
            group_size=arguments.group_size,
            dtype=arguments.dtype,
            overwrite=arguments.overwrite,
            progress=progress,
        ),
        output.export,
    )
