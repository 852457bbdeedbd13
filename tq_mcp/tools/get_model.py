"""The tool get_model."""

from typing import Annotated

from pydantic import Field

from tq_mcp import schemas
from tq_mcp.tools.strict import strict_tool
from tq_mcp.tools.work import ToolContext, light


async def get_model(
    context: ToolContext,
    name: Annotated[str, Field(min_length=1, max_length=200, description="name or alias, as list_models shows it")],
) -> schemas.ModelDetails:
    """Show all about one registered model: source, recipe, files with hashes, and everything measured of it."""
    return await light(context, lambda services: services.get_model(name))


TOOL = strict_tool(get_model, title="Show a model", read_only=True, idempotent=True, open_world=False)
