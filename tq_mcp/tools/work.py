"""How tools reach the services: heavy work through the worker, reading in a thread of its own."""

from collections.abc import Callable
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


@dataclass(frozen=True)
class State:
    """What one running server holds."""

    services: Services
    worker: Worker


ToolContext: TypeAlias = Context[State, Any]


async def heavy(context: ToolContext, work: Callable[[Services, Progress], T]) -> T:
    """Run work on models, with progress for the client, which may cancel it. Raises ToolError."""
    state = context.request_context.lifespan_context
    try:
        return await state.worker.run(lambda progress: work(state.services, progress), context.report_progress)
    except EXPECTED as error:
        raise ToolError(clean(explain(error), 2_000)) from error
    except (OSError, MemoryError) as error:
        raise ToolError(f"The machine refused: {type(error).__name__}: {error}.") from error


async def light(context: ToolContext, work: Callable[[Services], T]) -> T:
    """Read from the registry, also while heavy work goes on. Raises ToolError."""
    services = context.request_context.lifespan_context.services
    try:
        return await anyio.to_thread.run_sync(work, services)
    except EXPECTED as error:
        raise ToolError(clean(explain(error), 2_000)) from error
