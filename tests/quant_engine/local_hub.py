"""A Hugging Face Hub on this machine, of one repository in a folder, for huggingface_hub's own client."""

import hashlib
import json
import os
import re
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants, hf_api

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "owner/name"


@dataclass
class LocalHub:
    """url: its endpoint. folder: the repository's files. fetched: files that were sent whole, in order."""

    folder: Path
    url: str = ""
    fetched: list[str] = field(default_factory=list[str])
    commit: str = COMMIT

    @property
    def weights(self) -> list[str]:
        """Files of weights that were sent whole."""
        return [name for name in self.fetched if name.endswith(".safetensors")]

    def environment(self, cache: Path) -> dict[str, str]:
        """For a process that is to use this hub, and a cache of its own."""
        hub = {"HF_ENDPOINT": self.url, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        return os.environ | hub

    def use(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        """Have this process use this hub, and a cache of its own."""
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(hf_api.api, "endpoint", self.url)

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


@contextmanager
def local_hub(folder: Path) -> Generator[LocalHub]:
    """Serve the files of a folder as the repository "owner/name"."""
    hub = LocalHub(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Answers, hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: LocalHub, *arguments: Any) -> None:
        self.hub = hub
        super().__init__(*arguments)

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        if resolved := re.fullmatch(rf"/{REPOSITORY}/resolve/{self.hub.commit}/(.+)", path):
            self._file(resolved[1], with_body)
        elif path.startswith(f"/api/models/{REPOSITORY}/tree/"):
            self._json([self._entry(name) for name in self.hub.names()])
        elif path.startswith(f"/api/models/{REPOSITORY}"):
            siblings = [{"rfilename": entry["path"], **entry} for entry in map(self._entry, self.hub.names())]
            self._json({"id": REPOSITORY, "sha": self.hub.commit, "siblings": siblings})
        else:
            self.send_error(404, path)

    def _entry(self, name: str) -> dict[str, Any]:
        content = (self.hub.folder / name).read_bytes()
        oid = hashlib.sha1(content).hexdigest()
        return {"type": "file", "path": name, "size": len(content), "oid": oid}

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _file(self, name: str, with_body: bool) -> None:
        content = (self.hub.folder / name).read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": self.hub.commit}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
        if wanted:
            first, last = int(wanted[1]), min(int(wanted[2]), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            self._send(206, content[first : last + 1], headers)
            return
        if with_body:
            self.hub.fetched.append(name)
        self._send(200, content, headers, with_body)

    def _send(self, status: int, body: bytes, headers: dict[str, str], with_body: bool = True) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)
