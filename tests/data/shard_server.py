"""A local HTTP server of a folder that fails on purpose, as asked for each file."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Trouble = Callable[[str, int], str]
"""File name and number of the request for it (from 0) -> what happens: ok, 503, 404, cut, no-range, slow, other."""


class ShardServer:
    """url: of the folder. asked: requests for each file; ranges: the Range headers; trouble: may be replaced."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = ""
        self.asked: Counter[str] = Counter()
        self.ranges: list[str] = []
        self.trouble: Trouble = lambda name, number: "ok"
        self.lock = threading.Lock()


@contextmanager
def serving(folder: Path) -> Generator[ShardServer]:
    state = ShardServer(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, state))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, state: ShardServer, *rest) -> None:
        self.state = state
        super().__init__(*rest)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        with self.state.lock:
            kind = self.state.trouble(name, self.state.asked[name])
            self.state.asked[name] += 1
            if "Range" in self.headers:
                self.state.ranges.append(self.headers["Range"])
        path = self.state.folder / name
        if kind in ("503", "404") or not path.is_file():
            self.send_response(503 if kind == "503" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = path.read_bytes()
        if kind == "other":
            content = bytes(byte ^ 1 for byte in content)
        if kind == "slow":
            time.sleep(1.0)
        start = 0
        if "Range" in self.headers and kind != "no-range":
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        body = content[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with suppress(OSError):  # the client gave up
            self.wfile.write(body[: len(body) // 2] if kind == "cut" else body)
