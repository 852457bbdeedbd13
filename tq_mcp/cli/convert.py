"""`tq-mcp convert`."""

import argparse

from quant_engine.config import QuantConfig
from tq_mcp.cli import output
from tq_mcp.cli.parser import module_widths
from tq_mcp.cli.run import run_command


def run(arguments: argparse.Namespace) -> int:
    return run_command(
        arguments,
        lambda services, progress: services.convert(
            arguments.model,
            recipe=QuantConfig(
                bits=arguments.bits,
                group_size=arguments.group_size,
                rotation=arguments.rotation,
                use_qjl=arguments.use_qjl,
                fold_rotation=arguments.fold_rotation,
                seed=arguments.seed,
                **module_widths(arguments),
            ),
            name=arguments.name,
            output=arguments.mlx_path,
            revision=arguments.revision,
            dtype=arguments.dtype,
            keep_unfitting=arguments.keep_unfitting,
            keep_source=arguments.keep_source,
            target_bpw=arguments.target_bpw,
            target_text=arguments.target_text,
            progress=progress,
        ),
        output.conversion,
    )
