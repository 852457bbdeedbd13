"""What only a real process shows: stdout is the protocol's alone, and a client that leaves takes the work along."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mcp import Client
from mcp.client.stdio import StdioServerParameters

from registry import open_registry
from tests.tq_mcp.conftest import NAME, structured
from tq_mcp.cli import INTERRUPTED
from tq_mcp.settings import child_environment

pytestmark = pytest.mark.anyio

NOISY = """
import os, sys
from tq_mcp import services
from tq_mcp.cli import main

quiet = services.Services.list_models

def noisy(*values):
    print("stray print")
    sys.stdout.flush()
    os.write(1, b"stray bytes\\n")
    return quiet(*values)

services.Services.list_models = noisy
sys.exit(main(["serve", "--home", sys.argv[1]]))
"""


async def test_stray_output_does_not_reach_the_client(home: Path) -> None:
    server = StdioServerParameters(command=sys.executable, args=["-c", NOISY, str(home)], env=child_environment())
    async with Client(server) as client:
        listed = await structured(client, "list_models")
        assert [model["name"] for model in listed["models"]] == [NAME]


SLOW = """
import sys, time
from tq_mcp import services
from tq_mcp.cli import main

convert = services.convert

def slow(*values, progress, **options):
    def paced(done, total, message):
        time.sleep(0.2)
        progress(done, total, message)
    return convert(*values, progress=paced, **options)

services.convert = slow
sys.exit(main(["serve", "--home", sys.argv[1]]))
"""

HELLO = [
    {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {
        "protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}},
    {"jsonrpc": "2.0", "method": "notifications/initialized"},
]  # fmt: skip


def call(number: int, tool: str, **arguments: Any) -> dict[str, Any]:
    """A request to a tool that asks for progress."""
    params = {"name": tool, "arguments": arguments, "_meta": {"progressToken": number}}
    return {"jsonrpc": "2.0", "id": number, "method": "tools/call", "params": params}


def lines(*messages: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(message).encode() + b"\n" for message in messages)


def interrupted(server: "subprocess.Popen[bytes]") -> str:
    """What a server whose stdin stays open says on stderr when it is interrupted."""
    assert server.stderr
    server.send_signal(signal.SIGINT)
    assert server.wait(timeout=60) == INTERRUPTED
    return server.stderr.read().decode()


def test_one_interrupt_in_a_terminal_ends_the_server(home: Path) -> None:
    terminal, inner = os.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "tq_mcp", "serve", "--home", str(home)],
        stdin=inner, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as server:  # fmt: skip
        assert server.stdout
        try:
            os.write(terminal, lines(*HELLO))
            assert json.loads(server.stdout.readline())["id"] == 1
            assert "Interrupted" in interrupted(server)
        finally:
            server.kill()
            os.close(terminal)
            os.close(inner)


def test_an_interrupt_leaves_what_a_cancelled_call_does(home: Path, demo_model: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, str(home)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as server:  # fmt: skip
        assert server.stdin and server.stdout
        try:
            server.stdin.write(lines(*HELLO, call(2, "convert_model", model=str(demo_model), name="cut-short")))
            server.stdin.flush()
            assert json.loads(server.stdout.readline())["id"] == 1
            while json.loads(server.stdout.readline())["params"]["progress"] == 0:
                pass
            assert "Nothing was left half-written" in interrupted(server)
        finally:
            server.kill()
    assert [path.name for path in (home / "models").iterdir() if path.name != ".staging"] == [NAME]
    assert list((home / "models" / ".staging").iterdir()) == []
    with open_registry(home) as registry:
        assert registry.recovered == () and registry.models().total == 1


def test_every_line_on_stdout_is_the_protocols_and_the_server_ends_with_its_client(home: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "tq_mcp", "serve", "--home", str(home)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as server:  # fmt: skip
        assert server.stdin and server.stdout
        server.stdin.write(lines(*HELLO, call(2, "list_models")))
        server.stdin.flush()
        answers = [json.loads(server.stdout.readline()) for _ in range(2)]
        rest, _ = server.communicate(timeout=60)
    assert [answer["id"] for answer in answers] == [1, 2]
    assert answers[0]["result"]["serverInfo"]["name"] == "turboquant"
    assert answers[1]["result"]["structuredContent"]["total"] == 1
    assert rest == b"" and server.returncode == 0
