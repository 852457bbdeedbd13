"""The tool list_models."""

from typing import Annotated

from pydantic import Field

from registry import filter_help
from tq_mcp import schemas
from tq_mcp.tools.strict import strict_tool
from tq_mcp.tools.work import ToolContext, light


async def list_models(
    context: ToolContext,
    filters: Annotated[list[str], Field(max_length=20, description=filter_help())] = [],  # noqa: B006
    sort: Annotated[str, Field(description="a field, - before it for descending, such as ppl or -created_at")] = (
        "-created_at"
    ),
    limit: Annotated[int, Field(ge=1, le=100)] = 20,
    cursor: Annotated[str | None, Field(description="next_cursor of the page before, with the same filters")] = None,
) -> schemas.ModelList:
    """List the models made so far: recipe, size, latest perplexity and speed. Works while others convert."""
    return await light(context, lambda services: services.list_models(filters, sort, limit, cursor))


TOOL = strict_tool(list_models, title="List models", read_only=True, idempotent=True, open_world=False)
