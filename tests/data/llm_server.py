"""A small server that speaks OpenAI's chat completion protocol, and fails in the ways it is told to."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

TALK = "Q: What is there?\nA: There is a dog.\nQ: Where is it?\nA: It is on the left."


@dataclass
class Answer:
    """What the server does with one request."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    drip: float = 0.0  # seconds between bytes
    claims: int | None = None  # a Content-Length that is not true


def said(
    text: str | None, *, prompt: int = 100, completion: int = 20, reason: str = "stop", usage: bool = True
) -> Answer:
    """A proper chat completion."""
    reply: dict[str, Any] = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}],
    }
    if usage:
        reply["usage"] = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return Answer(body=json.dumps(reply).encode())


Script = Callable[[dict[str, Any], int], Answer]


class LlmServer:
    """Answers each request with ``script(body, how many came before)``; ``requests`` holds all bodies."""

    def __init__(self, script: Script) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.busiest = 0
        self._busy = 0
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server._lock:
                    number = len(server.requests)
                    server.requests.append({**body, "_path": self.path})
                    server.headers.append(dict(self.headers))
                    server.times.append(time.monotonic())
                    server._busy += 1
                    server.busiest = max(server.busiest, server._busy)
                answer = script(body, number)
                time.sleep(answer.delay)
                with server._lock:  # before the answer leaves: its client may ask again at once
                    server._busy -= 1
                with contextlib.suppress(OSError):  # a client that gave up waiting
                    self.send(answer)

            def send(self, answer: Answer) -> None:
                self.send_response(answer.status)
                length = len(answer.body) if answer.claims is None else answer.claims
                for name, value in {"Content-Length": str(length), **answer.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                for byte in [answer.body] if not answer.drip else [bytes([b]) for b in answer.body]:
                    self.wfile.write(byte)
                    time.sleep(answer.drip)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
