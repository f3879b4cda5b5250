"""A stand-in for the Hugging Face hub on loopback: it takes a repository and its commits, as far as
an upload of huggingface_hub asks for them.
"""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SMALL = 200_000  # bytes of a file that is part of the commit; larger ones are put beside it


class StandIn(ThreadingHTTPServer):
    """repositories: by id, file → bytes. made: what was asked of each. token: the one it takes."""

    def __init__(self, token: str):
        super().__init__(("127.0.0.1", 0), Handler)
        self.token, self.repositories, self.made, self.large = token, {}, {}, {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def log_message(self, *arguments: object) -> None: ...

    def do_GET(self) -> None:
        self._allowed() and self._repository(self.path.removeprefix("/api/models/"))

    def do_PUT(self) -> None:
        content = self._body()
        self.server.large[hashlib.sha256(content).hexdigest()] = content
        self._answer(200, {})

    def do_POST(self) -> None:
        content = self._body()
        if not self._allowed():
            return
        if self.path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            asked = json.loads(content)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            self.server.made[name], self.server.repositories[name] = asked, {}
            return self._answer(200, {"url": f"{self.server.address}/{name}", "id": name})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(content)["objects"]
            put = [{**one, "actions": {"upload": {"href": self._place(one)}}} for one in objects]
            return self._answer(200, {"transfer": "basic", "objects": put})
        name, _, what = (
            self.path.removeprefix("/api/models/").rpartition("/main")[0].rpartition("/")
        )
        if what == "preupload":
            files = json.loads(content)["files"]
            modes = ["regular" if one["size"] < SMALL else "lfs" for one in files]
            told = [
                {"path": one["path"], "uploadMode": mode, "shouldIgnore": False}
                for one, mode in zip(files, modes, strict=True)
            ]
            return self._answer(200, {"files": told})
        for line in content.splitlines():
            self._take(name, json.loads(line))
        url = f"{self.server.address}/{name}/commit/1"
        return self._answer(200, {"success": True, "commitOid": "1" * 40, "commitUrl": url})

    def _take(self, name: str, line: dict) -> None:
        held, value = self.server.repositories[name], line["value"]
        if line["key"] == "file":
            held[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            held[value["path"]] = self.server.large[value["oid"]]

    def _place(self, one: dict) -> str:
        return f"{self.server.address}/large/{one['oid']}"

    def _allowed(self) -> bool:
        if self.headers.get("authorization") == f"Bearer {self.server.token}":
            return True
        self._answer(401, {"error": "Invalid username or password."})
        return False

    def _repository(self, name: str) -> None:
        if name in self.server.repositories:
            return self._answer(200, {"id": name, "siblings": []})
        return self._answer(404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _answer(self, status: int, content: dict, headers: dict | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def hub(token: str):
    """A hub that takes this token, for as long as the block lasts."""
    server = StandIn(token)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
