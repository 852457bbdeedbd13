"""Types of arguments that several tools take, with the descriptions that agents read."""

from typing import Annotated, Literal

from pydantic import Field

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
AttentionBits = Annotated[ModuleBits | None, Field(description="of attention layers; 16 leaves them as they came")]
MlpBits = Annotated[ModuleBits | None, Field(description="of feed-forward layers, shared experts too")]
ExpertBits = Annotated[ModuleBits | None, Field(description="of a mixture's experts")]
ExpertDownBits = Annotated[ModuleBits | None, Field(description="of the experts' down projections")]
EmbedBits = Annotated[ModuleBits | None, Field(description="of token embeddings; default: as they came")]
HeadBits = Annotated[ModuleBits | None, Field(description="of the output projection; default: as it came")]
Skip = Annotated[
    list[str], Field(max_length=100, description="shell patterns of module paths to leave as they came: *.0.mlp.*")
]
BitsFor = Annotated[
    dict[str, ModuleBits],
    Field(max_length=100, description="bits by shell pattern of module paths; the last that matches counts"),
]
ProtectLayers = Annotated[int, Field(ge=0, le=1000, description="layers at each end to leave as they came")]
