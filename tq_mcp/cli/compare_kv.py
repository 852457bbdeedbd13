"""`tq-mcp compare-kv`."""

import argparse

from tq_mcp.cli import output
from tq_mcp.cli.run import read_prompt, run_command
from tq_mcp.services import cache_configs


def run(arguments: argparse.Namespace) -> int:
    return run_command(
        arguments,
        lambda services, progress: services.compare_kv_cache(
            arguments.model,
            read_prompt(arguments.prompt),
            max_tokens=arguments.max_tokens,
            caches=cache_configs(arguments.tq_bits, arguments.k_bits, arguments.v_bits, arguments.group_size),
            chat=arguments.chat,
            progress=progress,
        ),
        output.cache_comparison,
    )
