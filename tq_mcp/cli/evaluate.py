"""`tq-mcp evaluate`."""

import argparse

from tq_mcp.cli import output
from tq_mcp.cli.run import run_command


def run(arguments: argparse.Namespace) -> int:
    return run_command(
        arguments,
        lambda services, progress: services.evaluate(
            arguments.model,
            bits=arguments.bits,
            group_size=arguments.group_size,
            text=arguments.text,
            seq_len=arguments.seq_len,
            num_samples=arguments.num_samples,
            affine=not arguments.no_affine,
            qjl=not arguments.no_qjl,
            revision=arguments.revision,
            progress=progress,
        ),
        output.evaluation,
    )
