"""The tool verify_model."""

from typing import Annotated

from pydantic import Field

from tq_mcp import schemas
from tq_mcp.tools.strict import strict_tool
from tq_mcp.tools.work import ToolContext, heavy


async def verify_model(
    context: ToolContext,
    name: Annotated[str, Field(min_length=1, max_length=200, description="name or alias, as list_models shows it")],
) -> schemas.Verification:
    """Hash a registered model's files again: intact, or which changed, are missing, or are not the model's."""
    return await heavy(context, lambda services, progress: services.verify_model(name, progress))


TOOL = strict_tool(verify_model, title="Verify a model", read_only=True, idempotent=True, open_world=False)
