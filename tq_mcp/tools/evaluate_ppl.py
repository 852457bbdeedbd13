"""The tool evaluate_ppl."""

from typing import Annotated

from pydantic import Field

from tq_mcp import schemas
from tq_mcp.tools import arguments
from tq_mcp.tools.strict import strict_tool
from tq_mcp.tools.work import ToolContext, heavy


async def evaluate_ppl(
    context: ToolContext,
    model: arguments.Model,
    bits: arguments.Widths = [2, 3, 4],  # noqa: B006 (pydantic copies it)
    group_size: arguments.Group = 64,
    text: Annotated[
        str | None,
        Field(
            description="path of a UTF-8 file on the server's machine, or wikitext2 (downloaded once); "
            "default: English reference prose that is always there"
        ),
    ] = None,
    seq_len: Annotated[int, Field(ge=2, le=131_072, description="tokens a window")] = 512,
    num_samples: Annotated[int, Field(ge=1, le=10_000, description="windows; more is slower and surer")] = 32,
    affine: Annotated[bool, Field(description="also measure MLX's own affine quantization at the same bits")] = True,
    qjl: Annotated[bool, Field(description="also measure TurboQuant with QJL (float models only)")] = False,
    revision: arguments.Revision = None,
) -> schemas.Evaluation:
    """Measure what compression costs: perplexity with its standard error, divergence and agreement.

    A registered model is measured as it is, beside the float model that it was made from, and the rows are
    recorded; bits, group_size and qjl do not apply to it. A float model is measured at full precision and at each
    of `bits`, without writing anything. Compare perplexities only on the same text, windows and tokenizer.
    """
    return await heavy(
        context,
        lambda services, progress: services.evaluate(
            model,
            bits=bits,
            group_size=group_size,
            text=text,
            seq_len=seq_len,
            num_samples=num_samples,
            affine=affine,
            qjl=qjl,
            revision=revision,
            progress=progress,
        ),
    )


TOOL = strict_tool(evaluate_ppl, title="Measure perplexity", read_only=False, idempotent=False, open_world=True)
