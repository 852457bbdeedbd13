"""The command `tq-mcp`: parse, then import and run what the command needs, and nothing else."""

import importlib
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper

from tq_mcp.cli.parser import build_parser
from tq_mcp.settings import SettingsError
from tq_mcp.untrusted import is_text

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 failed, 2 usage, 130 interrupted."""
    _make_writable()
    parser = build_parser()
    for argument in sys.argv[1:] if argv is None else argv:
        if not is_text(argument):
            parser.error(f"the argument {argument!r} is not UTF-8")
    arguments = parser.parse_args(argv)
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
        _write_nowhere()
        return 1
    except OSError as error:
        print(f"tq-mcp: what was found could not be written: {error}.", file=sys.stderr)
        _write_nowhere()
        return 1


def _make_writable() -> None:
    """Have stdout and stderr take any letter; a stdout that is closed takes what is written nowhere."""
    if sys.stdout is None:  # pyright: ignore[reportUnnecessaryComparison]
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")


def _write_nowhere() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
