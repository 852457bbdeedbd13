"""What commands that use the services share: opening them, progress on stderr, failures as exit codes."""

import argparse
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TypeVar

from pydantic import BaseModel
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from metal_kernels import announce_compilation
from quant_engine.errors import InputError
from quant_engine.progress import Progress as Report
from tq_mcp.cli.output import Show, fail, print_result
from tq_mcp.errors import EXPECTED, describe
from tq_mcp.services import Services, open_services
from tq_mcp.settings import Settings
from tq_mcp.untrusted import is_text

R = TypeVar("R", bound=BaseModel)


def run_command(
    arguments: argparse.Namespace, work: Callable[[Services, Report], R], show: Show[R] | None = None
) -> int:
    """Do the work with a progress bar on stderr, then print its result on stdout: JSON where asked for, otherwise
    what `show` makes of it."""
    try:
        with open_services(Settings.read(arguments.home)) as services, progress_bar() as report:
            result = work(services, report)
    except EXPECTED as error:
        return fail(describe(error))
    except BrokenPipeError:
        raise
    except OSError as error:
        return fail(f"The machine refused: {error}.")
    print_result(result, arguments.json, show)
    return 0


@contextmanager
def progress_bar() -> Generator[Report]:
    """A bar on stderr where that is a terminal; compilation of kernels is announced in any case."""
    errors = Console(stderr=True)
    percent = TextColumn("{task.percentage:>3.0f} %")
    columns = (TextColumn("{task.description}"), BarColumn(), percent, TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task("starting", total=None)

        def report(done: int, total: int, message: str) -> None:
            bar.update(task, completed=done, total=total or None, description=message[:60])

        with announce_compilation(lambda notice: errors.print(notice, style="dim")):
            yield report


def read_prompt(prompt: str) -> str:
    """The prompt itself, or all of stdin for "-". Raises InputError where that cannot be read."""
    if prompt != "-":
        return prompt
    if sys.stdin is None:  # pyright: ignore[reportUnnecessaryComparison]
        raise InputError("stdin is closed, and the prompt - stands for what comes from there; give the prompt itself")
    try:
        read = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InputError(f"the prompt on stdin is not UTF-8: {error}") from error
    if not is_text(read):
        raise InputError("the prompt on stdin is not UTF-8; convert it first")
    return read
