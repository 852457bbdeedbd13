"""The command `tq-mcp`: parse, then import and run what the command needs, and nothing else."""

import importlib
import os
import sys
from collections.abc import Sequence

from tq_mcp.cli.parser import build_parser
from tq_mcp.settings import SettingsError

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 failed, 2 usage, 130 interrupted."""
    arguments = build_parser().parse_args(argv)
    try:
        command = importlib.import_module(f"tq_mcp.cli.{arguments.module}")
        code = int(command.run(arguments))
        sys.stdout.flush()
        return code
    except SettingsError as error:
        print(f"{error}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. Nothing was left half-written.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read stdout, `head` say, has had enough; Python would complain when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
