"""The tool convert_model."""

from typing import Annotated, Literal

from pydantic import Field

from quant_engine.config import QuantConfig
from tq_mcp import schemas
from tq_mcp.tools import arguments
from tq_mcp.tools.strict import strict_tool
from tq_mcp.tools.work import ToolContext, heavy

Name = Annotated[
    str | None,
    Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$",
        description="registry name of the new model; default: made from the source, bits and group size",
    ),
]


async def convert_model(
    context: ToolContext,
    model: arguments.FloatModel,
    bits: Annotated[arguments.WeightBits, Field(description="bits a weight; 4 costs least, 2 most quality")] = 3,
    group_size: arguments.Group = 64,
    rotation: Annotated[
        Literal["auto", "hadamard", "blockwise_hadamard", "none"],
        Field(description="how weights are mixed before rounding; auto takes the best that fits"),
    ] = "auto",
    use_qjl: Annotated[bool, Field(description="one more bit a weight for unbiased products; rarely helps")] = False,
    fold_rotation: arguments.FoldRotation = False,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        Field(description="of weights that are not quantized; default: as they are"),
    ] = None,
    widths: arguments.ModuleWidths = arguments.ModuleWidths(),  # noqa: B008 (never changed)
    target_bpw: Annotated[
        float | None,
        Field(
            ge=2,
            le=6,
            description="average bits a weight, scales included; layers without a width of their own get 2, 3 or 4 and "
            "groups of 32 to 128 by what each bears, measured by running the float model, which has to fit in memory",
        ),
    ] = None,
    target_text: Annotated[
        str | None,
        Field(
            description="what to measure on for target_bpw: path of a UTF-8 file on the server's machine, or wikitext2 "
            "(downloaded once); default: text that the model writes"
        ),
    ] = None,
    keep_unfitting: arguments.KeepUnfitting = False,
    keep_source: Annotated[
        bool,
        Field(
            description="keep a repository's weights in Hugging Face's cache, for evaluate_ppl and other conversions; "
            "default: each file is dropped after use, unless it was there before"
        ),
    ] = False,
    name: Name = None,
    revision: arguments.Revision = None,
) -> schemas.Conversion:
    """Compress a language model with TurboQuant to 2, 3 or 4 bits a weight, and register it.

    The model appears under the server's models folder when it is whole; cancelling leaves nothing behind. Small
    models take seconds, large ones minutes. Call plan_conversion first, and afterwards evaluate_ppl and generate
    with the name in the result.
    """
    values = widths.settings() | {
        "bits": bits,
        "group_size": group_size,
        "rotation": rotation,
        "use_qjl": use_qjl,
        "fold_rotation": fold_rotation,
    }
    return await heavy(
        context,
        lambda services, progress: services.convert(
            model,
            recipe=QuantConfig.from_dict(values),
            name=name,
            revision=revision,
            dtype=dtype,
            keep_unfitting=keep_unfitting,
            keep_source=keep_source,
            target_bpw=target_bpw,
            target_text=target_text,
            progress=progress,
        ),
    )


TOOL = strict_tool(convert_model, title="Convert a model", read_only=False, idempotent=False, open_world=True)
