"""`tq-mcp generate`: text on stdout as it comes, figures on stderr."""

import argparse
import sys

from quant_engine.config import CacheConfig
from quant_engine.progress import Progress
from quant_engine.sampling import Sampling
from tq_mcp import schemas
from tq_mcp.cli import output
from tq_mcp.cli.run import read_prompt, run_command
from tq_mcp.services import Services
from tq_mcp.untrusted import clean


def run(arguments: argparse.Namespace) -> int:
    def work(services: Services, progress: Progress) -> schemas.Generation:
        made = services.generate(
            arguments.model,
            read_prompt(arguments.prompt),
            max_tokens=arguments.max_tokens,
            sampling=Sampling(
                arguments.temperature,
                arguments.top_p,
                arguments.top_k,
                arguments.min_p,
                arguments.repetition_penalty,
                arguments.seed,
            ),
            chat=arguments.chat,
            cache=_cache(arguments.k_bits, arguments.v_bits),
            progress=progress,
            on_text=None if arguments.json else _write,
        )
        if not arguments.json:
            print()
            print(output.generation_line(made), file=sys.stderr)
        return made

    return run_command(arguments, work)


def _write(text: str) -> None:
    print(clean(text), end="", flush=True)


def _cache(k_bits: int | None, v_bits: int | None) -> CacheConfig | None:
    if k_bits is None and v_bits is None:
        return None
    usual = CacheConfig()
    return CacheConfig(k_bits or usual.k_bits, v_bits or usual.v_bits)
