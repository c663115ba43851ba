"""A Hub on this machine, which keeps what is published in memory: what huggingface_hub asks of the real one."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

COMMIT = "c" * 40

Files = dict[str, bytes]


class _Handler(BaseHTTPRequestHandler):
    repos: dict[str, Files]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        path = urlsplit(self.path).path
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization") or "someone", asked["name"])))
            self.repos.setdefault(name, {})
            self._answer({"url": f"{self._root()}/{name}", "name": name})
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            found = [{"path": name, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for name in names]
            self._answer({"files": found})
        elif "/commit/" in path:
            name = path.removeprefix("/api/models/").split("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.repos[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._answer({"commitUrl": f"{self._root()}/{name}/commit/{COMMIT}", "commitOid": COMMIT, "hookOutput": ""})
        else:
            self._absent("EntryNotFound")

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path.startswith("/api/models/"):
            return self._tell("/".join(path.split("/")[3:5]), path)
        name, _, rest = path.removeprefix("/").partition("/resolve/")
        content = self.repos.get(name, {}).get(rest.partition("/")[2])
        if content is None:
            return self._absent("EntryNotFound" if name in self.repos else "RepoNotFound")
        return self._send(content, {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET  # noqa: N815  # the name that the handler looks for

    def _tell(self, name: str, path: str) -> None:
        if name not in self.repos:
            return self._absent("RepoNotFound")
        files = self.repos[name]
        if "/tree/" in path:
            entries = [{"type": "file", "path": each, "size": len(c), "oid": _oid(c)} for each, c in files.items()]
            return self._answer(entries)
        if path.partition("/revision/")[2] not in ("main", COMMIT):
            return self._absent("RevisionNotFound")
        siblings = [{"rfilename": each} for each in files]
        return self._answer({"_id": "1", "id": name, "modelId": name, "sha": COMMIT, "tags": [], "siblings": siblings})

    def _absent(self, code: str) -> None:
        self._send(b"", {"X-Error-Code": code}, status=404)

    def _answer(self, told: Any) -> None:
        self._send(json.dumps(told).encode(), {"Content-Type": "application/json"})

    def _send(self, content: bytes, headers: dict[str, str], *, status: int = 200) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _root(self) -> str:
        return f"http://{self.headers['Host']}"

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def running() -> Iterator[tuple[str, dict[str, Files]]]:
    """The address of a Hub, and the files of its repositories by name."""
    repos: dict[str, Files] = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"repos": repos}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", repos
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def reached(patch: pytest.MonkeyPatch, cache: Path) -> Iterator[dict[str, Files]]:
    """The files of the repositories of a Hub that huggingface_hub takes for the real one meanwhile."""
    from huggingface_hub import constants

    with running() as (address, repos):
        patch.setattr(constants, "ENDPOINT", address)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)  # it may have been imported where the variable said so
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setenv("HF_TOKEN", "hf_of_nobody")
        patch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        yield repos
