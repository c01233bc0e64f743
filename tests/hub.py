"""A model hub on this machine, as far as downloads of data sets need one: lists of files, and the files."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Hub:
    """Data sets by id and commit, each a folder: `hub.add("me/set", "v1", folder)`; `asked` are the files sent."""

    def __init__(self, home: Path) -> None:
        self.home, self.asked, self.endpoint = home, list[str](), ""
        self._sets: dict[tuple[str, str], tuple[str, Path]] = {}

    def add(self, name: str, revision: str, folder: Path) -> str:
        """Serve a folder; returns its commit, which is a revision too, as `main` is of the one added last."""
        commit = hashlib.sha1(f"{name} {revision}".encode()).hexdigest()
        for known in (revision, commit, "main"):
            self._sets[name, known] = commit, folder
        return commit

    def found(self, name: str, revision: str) -> tuple[str, Path] | None:
        return self._sets.get((name, revision))

    @property
    def environment(self) -> dict[str, str]:
        """Of a process that asks this hub: the address is read when the client is imported."""
        kept = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
        kept.pop("HF_HUB_OFFLINE", None)
        return kept | {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(self.home), "HF_HUB_DISABLE_XET": "1"}


class Handler(BaseHTTPRequestHandler):
    def __init__(self, *args, hub: Hub) -> None:
        self.hub = hub
        super().__init__(*args)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "datasets"] and len(parts) >= 4:
            name, rest = "/".join(parts[2:4]), parts[4:]
            return self._about(name, rest[1] if len(rest) > 1 else "main", bool(rest) and rest[0] == "tree")
        if parts[:1] == ["datasets"] and parts[3:4] == ["resolve"]:
            return self._file("/".join(parts[1:3]), parts[4], "/".join(parts[5:]))
        return self._nothing("RepoNotFound")

    def _about(self, name: str, revision: str, tree: bool) -> None:
        known = self.hub.found(name, revision)
        if known is None:
            return self._nothing("RevisionNotFound" if self.hub.found(name, "main") else "RepoNotFound")
        commit, folder = known
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [str(path.relative_to(folder)) for path in files]
        if tree:
            body: object = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": "0" * 40}
                for name, path in zip(names, files, strict=True)
            ]
        else:
            body = {"id": name, "sha": commit, "siblings": [{"rfilename": one} for one in names]}
        return self._answer(json.dumps(body).encode(), "application/json", commit)

    def _file(self, name: str, revision: str, file: str) -> None:
        known = self.hub.found(name, revision)
        if known is None or not (known[1] / file).is_file():
            return self._nothing("EntryNotFound")
        if self.command == "GET":
            self.hub.asked.append(file)
        return self._answer((known[1] / file).read_bytes(), "application/octet-stream", known[0])

    def _answer(self, body: bytes, kind: str, commit: str) -> None:
        headers = {
            "Content-Type": kind, "Content-Length": str(len(body)), "X-Repo-Commit": commit,
            "ETag": f'"{hashlib.sha256(body).hexdigest()}"',
        }  # fmt: skip
        self.send_response(200)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _nothing(self, why: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", why)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_) -> None:
        pass


@contextmanager
def running(home: Path) -> Iterator[Hub]:
    """A hub at 127.0.0.1 for the length of the block; `home` is the cache of those who ask it."""
    hub = Hub(home)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, hub=hub))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
