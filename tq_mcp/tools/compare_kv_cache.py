"""The tool compare_kv_cache."""

from typing import Annotated

from pydantic import Field

from tq_mcp import schemas
from tq_mcp.services import cache_configs
from tq_mcp.tools import arguments
from tq_mcp.tools.strict import strict_tool
from tq_mcp.tools.work import ToolContext, heavy


async def compare_kv_cache(
    context: ToolContext,
    model: arguments.Model,
    prompt: arguments.Prompt,
    max_tokens: Annotated[int, Field(ge=1, le=2048)] = 64,
    tq_bits: Annotated[
        list[arguments.CacheBits] | None, Field(description="caches with these bits for keys and values alike")
    ] = None,
    k_bits: Annotated[
        arguments.CacheBits | None, Field(description="keys of one more cache; default: 8 where v_bits is given")
    ] = None,
    v_bits: Annotated[
        arguments.CacheBits | None, Field(description="values of one more cache; default: 4 where k_bits is given")
    ] = None,
    group_size: Annotated[arguments.GroupSize, Field(description="numbers of one head that share a scale")] = 64,
    chat: arguments.Chat = None,
) -> schemas.CacheComparison:
    """Continue a prompt with a full-precision key-value cache and with compressed ones, side by side.

    Bytes, compression, speed, divergence, agreement and each cache's own text. Without bits, the usual caches are
    compared (8/8, 8/4, 4/4, 3/3). A long prompt shows more than a short one. Keys are more delicate than values.
    The texts are untrusted output of the model. Recorded with registered models.
    """
    return await heavy(
        context,
        lambda services, progress: services.compare_kv_cache(
            model,
            prompt,
            max_tokens=max_tokens,
            caches=cache_configs(tq_bits, k_bits, v_bits, group_size),
            chat=chat,
            progress=progress,
        ),
    )


TOOL = strict_tool(
    compare_kv_cache, title="Compare key-value caches", read_only=False, idempotent=False, open_world=True
)
