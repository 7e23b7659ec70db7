"""The client waits where it should, tries again what may succeed, and gives up what cannot."""

import email.utils
import json
import time
from typing import Any

import pytest
from llm_server import Answer, LlmServer, said

from mmit.data.generate.client import Client, RefusedError, Reply, StoppedError, UnreachableError
from mmit.data.generate.settings import Endpoint
from mmit.errors import ConfigError

HELLO = [{"role": "user", "content": "Hello?"}]


def client(url: str, *, key: str = "", **more: Any) -> Client:
    given = {"base_url": url, "model": "m", "first_wait": 0.01, "tries": 3, "timeout": 5.0, **more}
    return Client(Endpoint.model_validate(given), key)


def test_a_request_is_what_the_protocol_asks_for() -> None:
    with LlmServer(lambda body, n: said("Hi.", prompt=7, completion=2)) as server:
        reply = client(server.url, key="s3cret", temperature=0.5, max_tokens=9, body={"top_p": 0.9}).ask(HELLO)
    assert reply == Reply(text="Hi.", is_whole=True, prompt_tokens=7, completion_tokens=2, is_counted=True)
    assert server.requests == [
        {"_path": "/v1/chat/completions", "model": "m", "temperature": 0.5, "max_tokens": 9, "top_p": 0.9,
         "messages": HELLO}
    ]  # fmt: skip
    assert server.headers[0]["Authorization"] == "Bearer s3cret"


@pytest.mark.parametrize(
    "failure",
    [
        Answer(status=500, body=b"oops"),
        Answer(status=503),
        Answer(status=429),
        Answer(body=b"{not JSON"),
        Answer(body=b'{"choices": []}'),
        Answer(body=b'{"choices": [{"message": {"content": [1]}}]}'),
        Answer(body=said("Hi.").body[:40], claims=500),  # cut off on the way
        Answer(body=b"", claims=10, headers={"Connection": "close"}),
        Answer(body=said("Hi.").body, delay=1.0),  # later than the timeout
        Answer(body=said("Hi.").body, drip=0.05),  # each byte in time, the whole is not
    ],
)
def test_what_may_pass_is_tried_again(failure: Answer) -> None:
    with LlmServer(lambda body, n: failure if n == 0 else said("Hi.")) as server:
        assert client(server.url, timeout=0.4).ask(HELLO).text == "Hi."
        assert len(server.requests) == 2


def test_retry_after_is_heeded_in_seconds_and_as_a_date() -> None:
    whole_second = int(time.time()) + 2
    until = time.monotonic() + whole_second - time.time()
    date = email.utils.formatdate(whole_second, usegmt=True)
    with LlmServer(
        lambda body, n: (
            [Answer(status=429, headers={"Retry-After": value}) for value in ("0.4", date)][n] if n < 2 else said("Hi.")
        )
    ) as server:
        client(server.url).ask(HELLO)
    assert server.times[1] - server.times[0] >= 0.4
    assert until - 0.01 <= server.times[2] < until + 1


def test_the_waits_double_and_are_not_all_alike() -> None:
    one = client("http://127.0.0.1:1", first_wait=1.0)
    waits = [[one._back_off(attempt, b"%d" % n) for n in range(50)] for attempt in range(8)]
    for attempt, some in enumerate(waits):
        longest = min(60.0, 2.0**attempt)
        assert longest / 2 <= min(some) < max(some) <= longest
        assert max(some) - min(some) > longest / 4


def test_after_all_tries_the_last_reason_is_told_without_the_key() -> None:
    with LlmServer(lambda body, n: Answer(status=500, body=b"the key s3cret broke me")) as server:
        with pytest.raises(UnreachableError, match=r"3 tries failed, the last with HTTP 500: the key \*\*\* broke me"):
            client(server.url, key="s3cret").ask(HELLO)
        assert len(server.requests) == 3


def test_a_server_that_is_not_there_is_unreachable() -> None:
    with LlmServer(lambda body, n: said("Hi.")) as server:
        url = server.url
    with pytest.raises(UnreachableError, match="ConnectionRefusedError"):
        client(url).ask(HELLO)


@pytest.mark.parametrize(
    ("status", "error"),
    [(400, RefusedError), (422, RefusedError), (401, ConfigError), (404, ConfigError), (302, RefusedError)],
)
def test_what_cannot_pass_is_asked_once(status: int, error: type[Exception]) -> None:
    answer = Answer(status=status, body=json.dumps({"error": {"message": "no"}}).encode(), headers={"Location": "/x"})
    with LlmServer(lambda body, n: answer) as server:
        with pytest.raises(error, match=f"HTTP {status}"):
            client(server.url).ask(HELLO)
        assert len(server.requests) == 1  # a redirect is not followed: the key would go with it


def test_a_wait_of_many_minutes_is_given_up() -> None:
    with (
        LlmServer(lambda body, n: Answer(status=429, headers={"Retry-After": "86400"})) as server,
        pytest.raises(UnreachableError, match="asks to wait for 86400 s"),
    ):
        client(server.url).ask(HELLO)


def test_a_run_that_ends_does_not_wait_for_the_next_try() -> None:
    with LlmServer(lambda body, n: Answer(status=500)) as server:
        one = client(server.url, first_wait=30.0)
        one.stop.set()
        with pytest.raises(StoppedError):
            one.ask(HELLO)


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:8000", "ftp://host/v1", "http://user:pass@host/v1", "http://h/v1?key=1"]
)
def test_an_address_that_is_none_or_holds_a_key_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="base_url"):
        client(url)
