"""Types of arguments that several tools take, with the descriptions that agents read."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

WeightBits = Literal[2, 3, 4]
CacheBits = Literal[2, 3, 4, 8]
GroupSize = Literal[0, 32, 64, 128]

Model = Annotated[
    str,
    Field(
        min_length=1,
        max_length=4096,
        description="registry name (see list_models), path of a folder on the server's machine, "
        "or Hugging Face repository as owner/name",
    ),
]
FloatModel = Annotated[
    str,
    Field(
        min_length=1,
        max_length=4096,
        description="float model: Hugging Face repository as owner/name, or path of a folder on the server's machine",
    ),
]
Revision = Annotated[str | None, Field(description="commit, tag or branch of a repository; default: the newest")]
Group = Annotated[
    GroupSize, Field(description="weights that share a scale; smaller is more accurate and larger; 0: one a row")
]
FoldRotation = Annotated[
    bool,
    Field(
        description="fold norms and the residual stream's rotation into the weights, so that less is rotated at run "
        "time; for llama, mistral, qwen2 and qwen3 only"
    ),
]
KeepUnfitting = Annotated[
    bool, Field(description="keep layers whose width the group size does not divide, instead of failing")
]
Widths = Annotated[list[WeightBits], Field(min_length=1, description="bits a weight, each its own row")]
Prompt = Annotated[str, Field(min_length=1, max_length=1_000_000, description="text to continue")]
Chat = Annotated[
    bool | None,
    Field(description="put the prompt into the model's chat template; default: where the model has one"),
]
ModuleBits = Literal[2, 3, 4, 16]


class ModuleWidths(BaseModel):
    """Bits for kinds of layers or single ones, where they should differ from `bits`; 16 leaves them as they came."""

    model_config = ConfigDict(extra="forbid")

    attn_bits: ModuleBits | None = Field(default=None, description="attention layers")
    mlp_bits: ModuleBits | None = Field(default=None, description="feed-forward layers, shared experts too")
    expert_bits: ModuleBits | None = Field(default=None, description="a mixture's experts")
    expert_down_bits: ModuleBits | None = Field(default=None, description="the experts' down projections")
    embed_bits: ModuleBits | None = Field(default=None, description="token embeddings; default: as they came")
    head_bits: ModuleBits | None = Field(default=None, description="the output projection; default: as it came")
    skip: list[str] = Field(
        default=[], max_length=100, description="shell patterns of module paths to leave: *.0.mlp.*"
    )
    bits_for: dict[str, ModuleBits] = Field(
        default={}, max_length=100, description="bits by shell pattern of module paths; the last that matches counts"
    )
    protect_layers: int = Field(default=0, ge=0, le=1000, description="layers at each end to leave as they came")

    def settings(self) -> dict[str, Any]:
        """As `QuantConfig` takes them."""
        return self.model_dump() | {"bits_for": list(self.bits_for.items())}
