"""How tools reach the services: heavy work through the worker, reading in a thread of its own."""

import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import anyio.to_thread
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError

from quant_engine.progress import Progress
from tq_mcp.errors import EXPECTED, explain
from tq_mcp.services import Services
from tq_mcp.untrusted import clean
from tq_mcp.worker import Worker

T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class State:
    """What one running server holds."""

    services: Services
    worker: Worker


ToolContext: TypeAlias = Context[State, Any]


async def heavy(context: ToolContext, work: Callable[[Services, Progress], T]) -> T:
    """Run work on models, with progress for the client, which may cancel it. Raises ToolError."""
    state = context.request_context.lifespan_context
    with _in_words():
        return await state.worker.run(lambda progress: work(state.services, progress), context.report_progress)


async def light(context: ToolContext, work: Callable[[Services], T]) -> T:
    """Read from the registry, also while heavy work goes on. Raises ToolError."""
    services = context.request_context.lifespan_context.services
    with _in_words():
        return await anyio.to_thread.run_sync(work, services)


@contextmanager
def _in_words() -> Generator[None]:
    """Turns every exception into a ToolError that an agent can act on; the traceback of what nobody expected is
    logged."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, EXPECTED):
            _log.exception("a tool failed")
        raise ToolError(clean(explain(error), 2_000)) from error
