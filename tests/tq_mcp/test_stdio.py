"""What only a real process shows: stdout is the protocol's alone, and a client that leaves takes the work along."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from mcp import Client
from mcp.client.stdio import StdioServerParameters

from tests.tq_mcp.conftest import NAME, structured
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


def test_every_line_on_stdout_is_the_protocols_and_the_server_ends_with_its_client(home: Path) -> None:
    requests = [
        {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {
            "protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}},
        {"jsonrpc": "2.0", "method": "notifications/initialized"},
        {"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": {"name": "list_models", "arguments": {}}},
    ]  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-m", "tq_mcp", "serve", "--home", str(home)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as server:  # fmt: skip
        assert server.stdin and server.stdout
        for request in requests:
            server.stdin.write(json.dumps(request) + "\n")
            server.stdin.flush()
        answers = [json.loads(server.stdout.readline()) for _ in range(2)]
        rest, _ = server.communicate(timeout=60)
    assert [answer["id"] for answer in answers] == [1, 2]
    assert answers[0]["result"]["serverInfo"]["name"] == "turboquant"
    assert answers[1]["result"]["structuredContent"]["total"] == 1
    assert rest == "" and server.returncode == 0
