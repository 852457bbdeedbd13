"""The tool plan_conversion."""

from typing import Annotated

from pydantic import Field

from tq_mcp import schemas
from tq_mcp.tools import arguments
from tq_mcp.tools.strict import strict_tool
from tq_mcp.tools.work import ToolContext, heavy


async def plan_conversion(
    context: ToolContext,
    model: arguments.FloatModel,
    bits: arguments.Widths = [2, 3, 4],  # noqa: B006 (pydantic copies it)
    group_size: arguments.Group = 64,
    context_tokens: Annotated[int, Field(ge=1, le=10_000_000, description="tokens the cache is to hold")] = 4096,
    use_qjl: bool = False,
    fold_rotation: arguments.FoldRotation = False,
    widths: arguments.ModuleWidths = arguments.ModuleWidths(),  # noqa: B008 (never changed)
    keep_unfitting: arguments.KeepUnfitting = False,
    revision: arguments.Revision = None,
) -> schemas.Plan:
    """Find out, within seconds and without downloading weights, what converting a model would give.

    Exact sizes for each width, memory to convert and to run, key-value cache sizes, whether it fits this machine,
    and a recommended width. Call this before convert_model. Writes nothing.
    """
    return await heavy(
        context,
        lambda services, progress: services.plan(
            model,
            bits=bits,
            group_size=group_size,
            context=context_tokens,
            use_qjl=use_qjl,
            fold_rotation=fold_rotation,
            widths=widths.settings(),
            keep_unfitting=keep_unfitting,
            revision=revision,
            progress=progress,
        ),
    )


TOOL = strict_tool(plan_conversion, title="Plan a conversion", read_only=True, idempotent=True, open_world=True)
