"""`tq-mcp mlx-lm`: mlx-lm's own programs on the models that tq-mcp opens."""

import argparse

from quant_engine.mlx_lm_adapter import run_program
from tq_mcp.cli.output import fail
from tq_mcp.errors import EXPECTED, describe
from tq_mcp.services import open_services
from tq_mcp.settings import Settings


def run(arguments: argparse.Namespace) -> int:
    try:
        with open_services(Settings.read(arguments.home)) as services:
            run_program(arguments.program, arguments.arguments, services.open)
    except EXPECTED as error:
        return fail(describe(error))
    return 0
