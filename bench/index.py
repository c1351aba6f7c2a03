"""A package index on the loopback interface, so that every tool downloads the same wheels the same way."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from measure import UnusableError


class Index(SimpleHTTPRequestHandler):
    """The simple repository API (PEP 503) with separate metadata (PEP 658), over one folder of wheels."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer `/simple/NAME/`, `/FILE.whl` or `/FILE.whl.metadata`."""
        folder = Path(self.directory)
        if found := re.fullmatch(r"/simple/([\w.-]+)/?", self.path):
            self._send(_page(folder, found[1]), "text/html")
        elif self.path.endswith(".whl.metadata"):
            self._send(_metadata(folder / self.path[1:].removesuffix(".metadata")), "text/plain")
        else:
            super().do_GET()

    def _send(self, body: bytes | None, kind: str) -> None:
        if body is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing for each request."""


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@cache
def _page(folder: Path, name: str) -> bytes | None:
    files = [
        path for path in sorted(folder.glob("*.whl")) if _normal(path.name.split("-")[0]) == _normal(name)
    ]
    if not files:
        return None
    rows = (
        f'<a href="/{path.name}#sha256={_digest(path)}" data-core-metadata="true">{path.name}</a><br>'
        for path in files
    )
    return f"<!DOCTYPE html><html><body>{''.join(rows)}</body></html>".encode()


def _digest(path: Path) -> str:
    total = sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            total.update(block)
    return total.hexdigest()


@cache
def _metadata(wheel: Path) -> bytes | None:
    if not wheel.is_file():
        return None
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        return archive.read(name)


@contextmanager
def serve(folder: Path, *, prefix: Sequence[str] = ()) -> Iterator[str]:
    """Serve `folder` from a process of its own, started by `prefix`, and yield the index's URL."""
    process = subprocess.Popen([*prefix, sys.executable, __file__, folder], stdout=subprocess.PIPE, text=True)
    try:
        port = process.stdout.readline().strip()
        if not port:
            raise UnusableError(f"the index ended with {process.wait()}")
        yield f"http://127.0.0.1:{port}/simple"
    finally:
        process.terminate()
        process.wait(timeout=10)


def main() -> None:
    """Serve the folder named on the command line on a free port, and print the port."""
    folder = sys.argv[1]

    class Here(Index):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=folder)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Here)
    sys.stdout.write(f"{server.server_port}\n")
    sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    main()
