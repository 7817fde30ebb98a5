"""A model hub on this machine, as much of one as an upload needs: repositories that take files in commits."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class Hub(ThreadingHTTPServer):
    """``files`` holds what was committed, by repository and path; ``refused`` the requests that it did not know."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.refused: list[str] = []

    @property
    def endpoint(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{host}:{port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, value: object, status: int = 200, **headers: str) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            value = json.loads(body)
            name = f"{value.get('organization') or 'someone'}/{value['name']}"
            self.server.files.setdefault(name, {})
            self._answer({"url": f"{self.server.endpoint}/{name}", "id": name, "name": name})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif self.path.endswith("/preupload/main"):
            files = [
                {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for each in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif self.path.endswith("/commit/main"):
            name = self.path.removeprefix("/api/models/").removesuffix("/commit/main")
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit = {"commitUrl": f"{self.server.endpoint}/{name}/commit/0", "commitOid": "0" * 40, "hookOutput": ""}
            self._answer({**commit, "success": True})
        else:
            self._refuse()

    def do_GET(self) -> None:
        if self.path.endswith("/resolve/main/README.md"):  # a new repository has no model card
            self._answer({"error": "no such file"}, 404, X_Error_Code="EntryNotFound")
        else:
            self._refuse()

    do_HEAD = do_GET

    def _refuse(self) -> None:
        self.server.refused.append(f"{self.command} {self.path}")
        self._answer({"error": "not part of this hub"}, 404)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that listens on this machine until the block ends."""
    hub = Hub()
    thread = Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
