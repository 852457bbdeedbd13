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
