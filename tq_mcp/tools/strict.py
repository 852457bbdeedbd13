"""Tools that refuse arguments they do not know, and say what is wrong in words an agent can act on."""

import inspect
from collections.abc import Callable
from typing import Any, cast

from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.mcpserver.tools import Tool
from mcp.types import ToolAnnotations
from pydantic import ConfigDict, ValidationError

from tq_mcp.untrusted import clean


class StrictTool(Tool):
    """A tool whose input schema has `additionalProperties: false`, and means it."""

    async def run(self, arguments: dict[str, Any], context: Context[Any, Any], convert_result: bool = False) -> Any:
        """Run it; raises ToolError for arguments that do not fit, naming each and what is allowed."""
        try:
            self.fn_metadata.validate_arguments(arguments)
        except ValidationError as error:
            problems = "; ".join(self._problem(found) for found in error.errors(include_url=False))
            raise ToolError(f"{self.name}: {problems}.") from error
        return await super().run(arguments, context, convert_result)

    def _problem(self, found: Any) -> str:
        name = ".".join(str(part) for part in found["loc"])
        if found["type"] == "extra_forbidden":
            return f"there is no argument {clean(name, 80)!r}; the arguments are {', '.join(self._names)}"
        if found["type"] == "missing":
            return f"the argument {name!r} is missing"
        return f"{name} is {clean(repr(found['input']), 200)}: {found['msg'][0].lower()}{found['msg'][1:]}"

    @property
    def _names(self) -> list[str]:
        return list(self.fn_metadata.arg_model.model_fields)


def strict_tool(
    function: Callable[..., Any],
    *,
    title: str,
    read_only: bool,
    idempotent: bool,
    open_world: bool,
) -> StrictTool:
    """The tool of a function: name, description, input and output schemas are read off it. None destroys."""
    annotations = ToolAnnotations(
        title=title,
        read_only_hint=read_only,
        destructive_hint=False,
        idempotent_hint=idempotent,
        open_world_hint=open_world,
    )
    tool = StrictTool.from_function(
        function, title=title, description=inspect.getdoc(function), annotations=annotations, structured_output=True
    )
    assert isinstance(tool, StrictTool)
    loose = tool.fn_metadata.arg_model
    strict = type(loose.__name__, (loose,), {"model_config": ConfigDict(extra="forbid"), "__doc__": None})
    tool.fn_metadata.arg_model = strict
    tool.parameters = _without_titles(strict.model_json_schema(by_alias=True))
    tool.fn_metadata.output_schema = _without_titles(tool.fn_metadata.output_schema or {})
    return tool


def _without_titles(schema: dict[str, Any]) -> dict[str, Any]:
    """A JSON schema without pydantic's titles, which repeat names in other words and fill an agent's context."""
    return {key: _each(value) for key, value in schema.items() if not (key == "title" and isinstance(value, str))}


def _each(value: Any) -> Any:
    if isinstance(value, dict):
        return _without_titles(cast(dict[str, Any], value))
    return [_each(item) for item in cast(list[Any], value)] if isinstance(value, list) else value
