"""`tq-mcp export`."""

import argparse
from pathlib import Path

from tq_mcp.cli import output
from tq_mcp.cli.run import run_command


def run(arguments: argparse.Namespace) -> int:
    place = Path(arguments.output).expanduser().absolute()
    return run_command(
        arguments,
        lambda services, progress: services.export(
            arguments.model,
            place,
            form=arguments.form,
            bits=arguments.bits,
            group_size=arguments.group_size,
            dtype=arguments.dtype,
            overwrite=arguments.overwrite,
            progress=progress,
        ),
        output.export,
    )
