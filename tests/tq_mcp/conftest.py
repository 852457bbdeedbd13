"""A home with one converted model that tests read, and one line to call a tool."""

import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from mcp import Client
from mcp.types import CallToolResult

from quant_engine.config import QuantConfig
from tq_mcp.services import open_services
from tq_mcp.settings import Settings

NAME = "small"

Call = Callable[..., Awaitable[CallToolResult]]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def converted_home(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Path:
    """A home with the demo model at 3 bits, named NAME. Not to be changed: copy it."""
    home = tmp_path_factory.mktemp("home")
    with open_services(Settings(home)) as services:
        services.convert(str(demo_model), recipe=QuantConfig(), name=NAME)
    return home


@pytest.fixture
def home(converted_home: Path, tmp_path: Path) -> Path:
    """An own copy of the home with one model."""
    return Path(shutil.copytree(converted_home, tmp_path / "home"))


def text_of(answer: CallToolResult) -> str:
    return " ".join(getattr(part, "text", "") for part in answer.content)


async def structured(client: Client, tool: str, **arguments: Any) -> dict[str, Any]:
    """The structured result of a call that has to work."""
    answer = await client.call_tool(tool, arguments)
    assert not answer.is_error, text_of(answer)
    assert answer.structured_content is not None
    return answer.structured_content


async def error(client: Client, tool: str, **arguments: Any) -> str:
    """The words of a call that has to fail."""
    answer = await client.call_tool(tool, arguments)
    assert answer.is_error, answer.structured_content
    return text_of(answer)
