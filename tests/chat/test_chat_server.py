"""The server: OpenAI's shapes, pictures of any kind, and a clear 4xx for everything odd."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_pictures import bomb, picture
from fastapi import FastAPI
from fastapi.testclient import TestClient

from mmit.chat import Chat
from mmit.chat.chat import load_for_chat
from mmit.chat.server import MAX_REQUEST_BYTES, create_app, model_name, serve
from mmit.errors import ConfigError

Json = dict[str, Any]
URL = "/v1/chat/completions"


@pytest.fixture
def app(llama: Chat) -> FastAPI:
    return create_app(llama.loaded, "tiny")


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app) as client:
        yield client


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def shown(url: str, text: str = "What colour is the circle?") -> list[Json]:
    return [
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}],
        }
    ]


def body(messages: object = None, **more: object) -> Json:
    said = [{"role": "user", "content": "How many?"}] if messages is None else messages
    return {"model": "tiny", "messages": said, "max_tokens": 8, **more}


def streamed(client: TestClient, request: Json) -> list[Json]:
    """The chunks of a streamed reply."""
    reply = client.post(URL, json=request | {"stream": True})
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = reply.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


# ------------------------------------------------------------------------------------------------ good requests


def test_a_completion_has_openais_shape_and_the_answer_of_chat(client: TestClient, llama: Chat) -> None:
    reply = client.post(URL, json=body(shown(data_url(picture("red"))))).json()
    assert reply["id"].startswith("chatcmpl-")
    assert (reply["object"], reply["model"]) == ("chat.completion", "tiny")
    [choice] = reply["choices"]
    text = llama.ask("What colour is the circle?", [picture("red")], max_new_tokens=8)
    assert choice["message"]["content"] == text
    assert (choice["index"], choice["message"]["role"], choice["finish_reason"]) == (0, "assistant", "length")
    usage = reply["usage"]
    assert usage["completion_tokens"] == 8
    assert usage["total_tokens"] == usage["prompt_tokens"] + 8


def test_a_stream_says_the_same_text_with_role_first_and_reason_last(client: TestClient) -> None:
    request = body(shown(data_url(picture("red"))), max_tokens=30)
    whole = client.post(URL, json=request).json()
    chunks = streamed(client, request | {"stream_options": {"include_usage": True}})
    assert {(chunk["object"], chunk["id"]) for chunk in chunks} == {("chat.completion.chunk", chunks[0]["id"])}
    *said, usage = chunks
    assert said[0]["choices"][0]["delta"]["role"] == "assistant"
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in said)
    assert text == whole["choices"][0]["message"]["content"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in said] == [None] * (len(said) - 1) + ["length"]
    assert (usage["choices"], usage["usage"]) == ([], whole["usage"])
    assert all(chunk["choices"] for chunk in streamed(client, request))  # no usage unless asked for


@pytest.mark.parametrize(
    ("form", "mode", "kind"),
    [("WEBP", "RGB", "image/webp"), ("BMP", "RGB", "image/bmp"), ("PNG", "RGBA", "image/png"), ("GIF", "P", "x/y")],
)
def test_any_image_that_pillow_opens_is_taken(client: TestClient, form: str, mode: str, kind: str) -> None:
    colour = {"RGB": (200, 0, 0), "RGBA": (200, 0, 0, 128), "P": 3}[mode]
    reply = client.post(URL, json=body(shown(data_url(picture(colour, form, mode), kind))))
    assert reply.status_code == 200


def test_turns_and_pictures_of_a_whole_conversation_are_seen(client: TestClient, llama: Chat) -> None:
    first = llama.ask("One?", [picture("red")], max_new_tokens=5)
    second = llama.ask("Two?", [picture("blue")], max_new_tokens=5)
    messages = [*shown(data_url(picture("red")), "One?"), {"role": "assistant", "content": first}]
    reply = client.post(URL, json=body([*messages, *shown(data_url(picture("blue")), "Two?")], max_tokens=5)).json()
    assert reply["choices"][0]["message"]["content"] == second


def test_limits_stop_and_seed_are_obeyed(client: TestClient) -> None:
    def reply(**more: object) -> Json:
        return client.post(URL, json=body(**more)).json()

    assert reply(max_completion_tokens=3)["usage"]["completion_tokens"] == 3
    text = reply(max_tokens=20)["choices"][0]["message"]["content"]
    for stop in (text[5:8], ["never said", text[5:8]]):
        choice = reply(max_tokens=20, stop=stop)["choices"][0]
        assert choice["message"]["content"] == text[: text.index(text[5:8])].strip()
        assert choice["finish_reason"] == "stop"
    drawn = [reply(temperature=1.8, top_p=0.95, seed=seed)["choices"][0]["message"]["content"] for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_neutral_values_of_what_is_not_done_and_unknown_fields_are_taken(client: TestClient) -> None:
    neutral = {"n": 1, "tools": None, "logprobs": False, "frequency_penalty": 0.0, "response_format": {"type": "text"}}
    assert client.post(URL, json=body(**neutral, user="me", temperature=None, stop=None)).status_code == 200
    developer = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "How many?"}]
    assert client.post(URL, json=body(developer)).status_code == 200


def test_models_health_and_page_are_there(client: TestClient) -> None:
    listed = client.get("/v1/models").json()
    assert (listed["object"], [model["id"] for model in listed["data"]]) == ("list", ["tiny"])
    assert client.get("/v1/models/tiny").json() == listed["data"][0]
    assert client.get("/health").json() == {"status": "ok", "model": "tiny"}
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http" not in page.text.replace("http-equiv", "")  # nothing is fetched from anywhere else


# ------------------------------------------------------------------------------------------------ odd requests

_IMAGE = "messages.0.content.0.image_url"
_TEXT = {"role": "user", "content": "How many?"}


@pytest.mark.parametrize(
    ("request_body", "param", "reason"),
    [
        ({"model": "tiny"}, "messages", "Field required"),
        (body([]), None, "the last message must be the user's"),
        (body("hello"), "messages", "valid array"),
        (body([{"role": "tool", "content": "x"}]), "messages.0.role", "'user'"),
        (body([{"role": "user", "content": None}]), "messages.0.content", "valid array"),
        (body([{"role": "user", "content": ""}]), None, "message 1 asks nothing"),
        (body([{"role": "user", "content": [{"type": "input_audio"}]}]), "messages.0.content.0", "'image_url'"),
        (body([_TEXT, _TEXT]), None, "take turns"),
        (body([_TEXT, {"role": "assistant", "content": "Two."}]), None, "the last message must be the user's"),
        (body([_TEXT | {"content": "Say </s>"}]), None, "control token"),
        (body(shown("data:image/png;base64,AAA")), _IMAGE, "base64 of the picture is broken"),
        (body(shown("data:image/png;base64,Zürich")), _IMAGE, "base64 of the picture is broken"),
        (body(shown("data:image/svg+xml,<svg/>")), _IMAGE, "not base64"),
        (body(shown(data_url(b"no image"))), None, "no image PIL can read"),
        (body(shown(data_url(b""))), None, "zero bytes"),
        (body(shown(data_url(bomb()))), None, "decompression bomb"),
        (body(shown("file:///etc/passwd")), _IMAGE, "reads no files"),
        (body(shown("http://127.0.0.1/x.png")), _IMAGE, "fetches no addresses"),
        (body(shown("/etc/passwd")), _IMAGE, "reads no files"),
        (body([_TEXT | shown(data_url(b"x"))[0] | {"role": "system"}]), _IMAGE, "only the user shows images"),
        (body(max_tokens=0), "max_tokens", "greater than or equal to 1"),
        (body(max_tokens=10**30), None, "context holds 2048"),
        (body(temperature=-1), "temperature", "greater than or equal to 0"),
        (body(top_p=0), "top_p", "greater than 0"),
        (body(stop=[""]), "stop.0", "at least 1 character"),
        (body(seed="x"), "seed", "valid integer"),
        (body(n=2), "n", "does not do that"),
        (body(tools=[{"type": "function"}]), "tools", "does not do that"),
    ],
)
def test_an_odd_request_is_a_400_that_says_what_is_wrong(
    client: TestClient, request_body: Json, param: str | None, reason: str
) -> None:
    for stream in (False, True):
        reply = client.post(URL, json=request_body | {"stream": stream})
        error = reply.json()["error"]
        assert (reply.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
        assert reason in error["message"]
        assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[1]",
        b"\xff\xfe",
        b'"text"',
        b"[" * 100_000,
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    ],
)
def test_a_body_that_is_no_request_is_a_400(client: TestClient, raw: bytes) -> None:
    reply = client.post(URL, content=raw)
    assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error")


def test_another_model_another_route_and_another_method_have_the_error_shape(client: TestClient) -> None:
    wrong = client.post(URL, json=body() | {"model": "gpt-4"})
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (404, "model_not_found")
    assert "this server has 'tiny'" in wrong.json()["error"]["message"]
    assert client.get("/v1/models/other/name").status_code == 404
    for reply, status in ((client.get("/v1/nothing"), 404), (client.get(URL), 405)):
        assert (reply.status_code, reply.json()["error"]["type"]) == (status, "invalid_request_error")


def test_a_request_that_is_too_large_is_refused_with_or_without_its_length(client: TestClient) -> None:
    block = b" " * (1 << 20)
    blocks = (MAX_REQUEST_BYTES >> 20) + 1

    def chunks() -> Iterator[bytes]:  # sent without a content-length
        for _ in range(blocks):
            yield block

    for content in (block * blocks, chunks()):
        reply = client.post(URL, content=content)
        assert reply.status_code == 413
        assert "larger than" in reply.json()["error"]["message"]


def test_a_model_that_fails_is_a_500_in_the_same_shape(llama_stage: Path) -> None:
    loaded = load_for_chat(llama_stage, device="cpu")
    torch.nn.init.constant_(loaded.model.language_model.get_output_embeddings().weight, float("nan"))
    with TestClient(create_app(loaded, "broken"), raise_server_exceptions=False) as client:
        reply = client.post(URL, json=body(temperature=1) | {"model": "broken"})
    assert (reply.status_code, reply.json()["error"]["type"]) == (500, "server_error")


# ------------------------------------------------------------------------------------------------ clients that leave


async def _call(app: FastAPI, request: Json, *, leave_after: int) -> list[Json]:
    """Send a request and disconnect after that many messages of the reply; the messages that were sent."""
    sent: list[Json] = []
    gone = asyncio.Event()
    bodies = [{"type": "http.request", "body": json.dumps(request).encode(), "more_body": False}]

    async def receive() -> Json:
        if bodies:
            return bodies.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(dict(message))
        if len(sent) >= leave_after:
            gone.set()

    if leave_after == 0:
        gone.set()
    scope = {"type": "http", "asgi": {"spec_version": "2.3"}, "http_version": "1.1", "method": "POST", "path": URL}
    await app(scope | {"query_string": b"", "headers": [], "scheme": "http"}, receive, send)
    return sent


def test_a_client_that_leaves_stops_its_answer_and_frees_the_queue(llama: Chat) -> None:
    long = body(max_tokens=1500)

    async def story() -> tuple[list[Json], list[Json], list[Json]]:
        app = create_app(llama.loaded, "tiny")
        left, never_read, served = await asyncio.gather(
            _call(app, long | {"stream": True}, leave_after=4),
            _call(app, long, leave_after=0),
            _call(app, body(), leave_after=99),
        )
        return left, never_read, served

    left, never_read, served = asyncio.run(story())
    assert len(left) < 20  # of about 1500 pieces
    assert never_read[0]["status"] == 499
    assert served[0]["status"] == 200


def test_answers_to_several_clients_are_made_one_after_the_other(llama: Chat) -> None:
    async def story() -> list[list[Json]]:
        app = create_app(llama.loaded, "tiny")
        return await asyncio.gather(*(_call(app, body(), leave_after=99) for _ in range(3)))

    texts = {json.loads(sent[1]["body"])["choices"][0]["message"]["content"] for sent in asyncio.run(story())}
    assert texts == {llama.ask("How many?", max_new_tokens=8)}


# ------------------------------------------------------------------------------------------------ starting


def test_an_address_that_cannot_be_taken_is_one_sentence(llama_stage: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"cannot listen on 127\.0\.0\.1 port {port} .*--port"):
            serve(llama_stage, port=port)
    with pytest.raises(ConfigError, match="cannot listen on no such host"):
        serve(llama_stage, host="no such host")
    with pytest.raises(ConfigError, match="--port 70000: choose"):
        serve(llama_stage, port=70_000)


def test_a_model_is_called_as_its_stage(tmp_path: Path) -> None:
    assert model_name(tmp_path / "instruct") == "instruct"
    assert model_name(tmp_path / "instruct" / "model") == "instruct"
