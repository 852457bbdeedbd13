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
    attn_bits: arguments.AttentionBits = None,
    mlp_bits: arguments.MlpBits = None,
    expert_bits: arguments.ExpertBits = None,
    expert_down_bits: arguments.ExpertDownBits = None,
    embed_bits: arguments.EmbedBits = None,
    head_bits: arguments.HeadBits = None,
    skip: arguments.Skip = [],  # noqa: B006 (pydantic copies it)
    bits_for: arguments.BitsFor = {},  # noqa: B006 (pydantic copies it)
    protect_layers: arguments.ProtectLayers = 0,
    keep_unfitting: arguments.KeepUnfitting = False,
    revision: arguments.Revision = None,
) -> schemas.Plan:
    """Find out, within seconds and without downloading weights, what converting a model would give.

    Exact sizes for each width, memory to convert and to run, key-value cache sizes, whether it fits this machine,
    and a recommended width. Call this before convert_model. Writes nothing.
    """
    widths = {
        "attn_bits": attn_bits,
        "mlp_bits": mlp_bits,
        "expert_bits": expert_bits,
        "expert_down_bits": expert_down_bits,
        "embed_bits": embed_bits,
        "head_bits": head_bits,
        "skip": skip,
        "bits_for": list(bits_for.items()),
        "protect_layers": protect_layers,
    }
    return await heavy(
        context,
        lambda services, progress: services.plan(
            model,
            bits=bits,
            group_size=group_size,
            context=context_tokens,
            use_qjl=use_qjl,
            widths=widths,
            keep_unfitting=keep_unfitting,
            revision=revision,
            progress=progress,
        ),
    )


TOOL = strict_tool(plan_conversion, title="Plan a conversion", read_only=True, idempotent=True, open_world=True)
