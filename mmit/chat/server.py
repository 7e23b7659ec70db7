"""A model behind OpenAI's chat completion protocol, and a page to chat with it in the browser.

One model, one answer at a time, first come first served; a client that leaves ends its answer. Nothing is fetched,
nothing is read from disk but the page, and no conversation is kept. Importing this module needs the extra ``serve``.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
import uuid
from collections.abc import AsyncGenerator, Generator
from contextlib import aclosing
from importlib import resources
from pathlib import Path

from mmit.chat.answer import Answer, answer
from mmit.chat.chat import Precision, load_for_chat
from mmit.chat.protocol import (
    ChatRequest,
    Json,
    Reply,
    RequestError,
    error_body,
    read_conversation,
    read_request,
    usage,
)
from mmit.config import WholeModel
from mmit.errors import ConfigError, MissingExtra, MmitError
from mmit.models.load import ModelSource
from mmit.models.loaded import LoadedModel

try:
    import anyio
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
except ModuleNotFoundError as error:
    raise MissingExtra(str(error.name), "serve", "mmit serve") from error

MAX_REQUEST_BYTES = 32 * 1024 * 1024
"""A larger body is refused before it is read to its end."""

_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
}
_CLIENT_LEFT = 499  # seen in logs only; nobody is there to read it
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def serve(
    directory: ModelSource,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str = "auto",
    precision: Precision = "auto",
) -> None:
    """Serve the model in ``directory`` until Ctrl-C. ``port`` 0 takes any free one; the address is printed.

    Raises ConfigError where the address cannot be taken, CheckpointError for a directory without a model.
    """
    with _listen(host, port) as listener:
        loaded = load_for_chat(directory, device=device, precision=precision)
        name = model_name(directory)
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listener.getsockname()[1]}"
        sys.stdout.write(f"chat page {address}   OpenAI API {address}/v1   model {name}   Ctrl-C stops\n")
        sys.stdout.flush()
        app = create_app(loaded, name)
        config = uvicorn.Config(app, log_level="warning", server_header=False, timeout_graceful_shutdown=3)
        uvicorn.Server(config).run(sockets=[listener])


def model_name(directory: ModelSource) -> str:
    """What clients call the model: the name of its directory, or of the stage that holds it as ``model/``."""
    path = Path(directory.path if isinstance(directory, WholeModel) else directory).resolve()
    return path.parent.name if path.name == "model" else path.name


def create_app(loaded: LoadedModel, name: str) -> FastAPI:
    """The web application that answers with ``loaded`` under the model name ``name``."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    service = _Service(loaded, name)
    page = (resources.files("mmit.chat") / "page.html").read_text(encoding="utf-8")
    card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "mmit"}

    @app.get("/")
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page, headers=_PAGE_HEADERS)

    @app.get("/health")
    async def health() -> Json:
        return {"status": "ok", "model": name}

    @app.get("/v1/models")
    async def list_models() -> Json:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{model:path}")
    async def show_model(model: str) -> Json:
        service.check_name(model)
        return card

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        return await service.complete(request)

    @app.exception_handler(MmitError)
    async def refuse(_: Request, error: MmitError) -> JSONResponse:
        if isinstance(error, RequestError):
            return _error(str(error), status=error.status, param=error.param, code=error.code)
        return _error(str(error), status=400)

    @app.exception_handler(HTTPException)
    async def no_such_route(request: Request, error: HTTPException) -> JSONResponse:
        return _error(f"{request.method} {request.url.path}: {error.detail}", status=error.status_code)

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, error: ClientDisconnect) -> Response:
        del error  # the client left while sending
        return Response(status_code=_CLIENT_LEFT)

    @app.exception_handler(Exception)
    async def our_fault(_: Request, error: Exception) -> JSONResponse:
        return _error(f"the model failed: {type(error).__name__}", status=500)

    return app


class _Service:
    """The model and its queue: whoever holds ``turn`` may use the model, and the tokenizer with it."""

    def __init__(self, loaded: LoadedModel, name: str) -> None:
        self.loaded = loaded
        self.name = name
        self.turn = asyncio.Lock()

    def check_name(self, asked: str | None) -> None:
        """Raise RequestError (404) for another model than the one served."""
        if asked not in (None, self.name):
            message = f"there is no model '{asked}'; this server has '{self.name}'"
            raise RequestError(message, param="model", code="model_not_found", status=404)

    async def complete(self, request: Request) -> Response:
        """The reply to a request for a completion, streamed if it says so."""
        asked = read_request(await _body(request))
        self.check_name(asked.model)
        conversation, sampling = read_conversation(asked), asked.sampling
        async with self.turn:
            said = await run_in_threadpool(answer, self.loaded, conversation, sampling)
        reply = Reply(id=f"chatcmpl-{uuid.uuid4().hex}", created=int(time.time()), model=self.name)
        if asked.stream:
            return StreamingResponse(
                self.events(said, asked, reply), media_type="text/event-stream", headers=_STREAM_HEADERS
            )
        pieces: list[str] = []
        async with aclosing(self.pieces(said, request)) as spoken:
            async for piece in spoken:
                pieces.append(piece)
        if said.finish_reason is None:
            return Response(status_code=_CLIENT_LEFT)
        counts = usage(said.prompt_tokens, said.completion_tokens)
        return JSONResponse(reply.completion("".join(pieces), said.finish_reason, counts))

    async def events(self, said: Answer, asked: ChatRequest, reply: Reply) -> AsyncGenerator[str, None]:
        """Server-sent events of a streamed reply."""
        yield _event(reply.chunk({"role": "assistant", "content": ""}))
        async with aclosing(self.pieces(said)) as spoken:
            async for piece in spoken:
                yield _event(reply.chunk({"content": piece}))
        yield _event(reply.chunk({}, said.finish_reason))
        if asked.wants_usage:
            yield _event(reply.usage_chunk(usage(said.prompt_tokens, said.completion_tokens)))
        yield "data: [DONE]\n\n"

    async def pieces(self, said: Answer, request: Request | None = None) -> AsyncGenerator[str, None]:
        """The pieces of an answer, made in threads; the model stops when this closes or the client leaves."""
        async with self.turn:
            spoken = iter(said)
            try:
                while request is None or not await request.is_disconnected():
                    piece = await run_in_threadpool(_next, spoken)
                    if piece is None:
                        break
                    yield piece
            finally:
                with anyio.CancelScope(shield=True):
                    await run_in_threadpool(spoken.close)


def _next(spoken: Generator[str, None, None]) -> str | None:
    return next(spoken, None)


async def _body(request: Request) -> bytes:
    too_large = RequestError(
        f"the request is larger than {MAX_REQUEST_BYTES} bytes; send smaller or fewer images", status=413
    )
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > MAX_REQUEST_BYTES:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_REQUEST_BYTES:
            raise too_large
    return bytes(body)


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65_535:
        raise ConfigError(f"--port {port}: choose a number from 0 (any free one) to 65535")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host} port {port} ({error.strerror}); choose another --host or --port"
        ) from error


def _event(content: Json) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _error(message: str, *, status: int, param: str | None = None, code: str | None = None) -> JSONResponse:
    return JSONResponse(error_body(message, status=status, param=param, code=code), status_code=status)
