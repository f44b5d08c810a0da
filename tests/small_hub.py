"""A real HTTP server with the part of the Hub's API that an upload needs; it stores all uploaded files."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

USERS = {"hf_writer": "me", "hf_reader": "reader"}
"""The user of each token; `hf_reader` may not write, and the server rejects any other token."""
CUT_OFF = "hf_cut"
"""The server closes the connection of requests with this token without an answer."""


class Hub(ThreadingHTTPServer):
    """Repositories by id: `private`, and in `files` the content of each committed file by path."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Requests)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.large: dict[str, bytes] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.cards: list[str] = []


@contextmanager
def small_hub() -> Iterator[Hub]:
    """Run a hub in a thread inside the block."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


class Requests(BaseHTTPRequestHandler):
    """Handles the requests of a `Hub`."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.body()
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        path = self.path.partition("?")[0].strip("/").split("/")
        if token == CUT_OFF:
            self.close_connection = True
        elif path == ["api", "validate-yaml"]:
            self.server.cards.append(json.loads(body)["content"])
            self.answer({"errors": [], "warnings": []})
        elif token not in USERS:
            self.answer({"error": "Invalid username or password."}, 401)
        elif USERS[token] == "reader":
            self.answer({"error": "You don't have the rights to create a model"}, 403)
        elif path == ["api", "repos", "create"]:
            self.create(json.loads(body), USERS[token])
        elif path[:2] == ["api", "models"] and path[4] == "preupload":
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif path[-2:] == ["objects", "batch"]:
            self.batch(json.loads(body))
        elif path[0] == "verify":
            self.answer({})
        elif path[:2] == ["api", "models"] and path[4] == "commit":
            self.commit("/".join(path[2:4]), [json.loads(line) for line in body.splitlines()])
        else:
            self.answer({"error": f"{self.path} does not exist"}, 404)

    def do_PUT(self) -> None:
        self.server.large[self.path.rpartition("/")[2]] = self.body()
        self.answer({})

    def create(self, request: dict[str, Any], user: str) -> None:
        name = f"{request.get('organization') or user}/{request['name']}"
        exists = name in self.server.files
        self.server.files.setdefault(name, {})
        self.server.private.setdefault(
            name, request.get("visibility") == "private" or bool(request.get("private"))
        )
        self.answer({"url": f"{self.server.address}/{name}", "id": name}, 409 if exists else 200)

    def batch(self, request: dict[str, Any]) -> None:
        objects = []
        for entry in request["objects"]:
            upload = {"href": f"{self.server.address}/large/{entry['oid']}"}
            verify = {"href": f"{self.server.address}/verify/{entry['oid']}"}
            objects.append({**entry, "actions": {"upload": upload, "verify": verify}})
        self.answer({"transfer": "basic", "objects": objects})

    def commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.server.files[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.server.large[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                self.server.files[name][value["path"]] = content
        commit = "0" * 40
        self.answer(
            {
                "commitUrl": f"{self.server.address}/{name}/commit/{commit}",
                "commitOid": commit,
                "success": True,
            }
        )

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def answer(self, content: Any, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Write no log; tests read the stored files."""
