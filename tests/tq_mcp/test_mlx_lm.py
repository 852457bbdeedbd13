"""mlx-lm's own programs, started through the command as a user would start them."""

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tq_mcp.conftest import NAME

PROMPT = "The history of the city begins in"
STARTS_WITHIN_S = 60


@pytest.fixture(scope="module")
def expected(converted_home: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What tq-mcp itself writes."""
    home = shutil.copytree(converted_home, tmp_path_factory.mktemp("own") / "home")
    own = [sys.executable, "-m", "tq_mcp", "generate", "--home", str(home), "--model", NAME, "--prompt", PROMPT]
    ended = subprocess.run([*own, "--max-tokens", "12", "--json"], capture_output=True, text=True, check=True)
    return json.loads(ended.stdout)["text"].strip()


def command(home: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "tq_mcp", "mlx-lm", "--home", str(home), *arguments]


def run(repository: Path, home: Path, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(home, *arguments), cwd=repository, input=stdin, capture_output=True, text=True, check=False
    )


def test_generate_writes_what_tq_mcp_writes(repository: Path, home: Path, expected: str) -> None:
    ended = run(repository, home, "generate", "--model", NAME, "--prompt", PROMPT, "--max-tokens", "12")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split("==========")[1].strip() == expected


def test_chat_answers(repository: Path, home: Path, tmp_path: Path, expected: str) -> None:
    folder = Path(shutil.copytree(home / "models" / NAME, tmp_path / "chat"))
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    ended = run(repository, home, "chat", "--model", str(folder), "--max-tokens", "12", stdin=f"{PROMPT}\nq\n")
    assert ended.returncode == 0, ended.stderr
    assert expected[:20] in ended.stdout


def test_a_model_that_is_nowhere_is_one_paragraph(repository: Path, home: Path) -> None:
    ended = run(repository, home, "generate", "--model", "smal", "--prompt", "x")
    assert ended.returncode == 1
    assert ended.stderr.startswith("tq-mcp: ") and f"Nearest: {NAME}" in ended.stderr


@pytest.fixture
def server(repository: Path, home: Path, tmp_path: Path) -> Iterator[str]:
    """The address of mlx-lm's server on the converted model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open(tmp_path / "server.log", "w") as log:
        process = subprocess.Popen(
            command(home, "server", "--model", NAME, "--port", str(port)), cwd=repository, stdout=log, stderr=log
        )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait(process, f"{address}/health", tmp_path / "server.log")
        yield address
    finally:
        process.terminate()
        process.wait(30)


def _wait(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + STARTS_WITHIN_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"the server did not start: {log.read_text()}")


def post(address: str, **body: Any) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def test_the_server_completes(server: str, expected: str) -> None:
    answer = post(server, prompt=PROMPT, max_tokens=12, temperature=0)
    assert answer["choices"][0]["text"].strip() == expected
