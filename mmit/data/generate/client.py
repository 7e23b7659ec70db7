"""A client of OpenAI's chat completion protocol on the standard library: deadlines, back-off, and nothing more.

``http.client`` and not ``urllib``: it follows no redirect, which would hand the key to another host, and reads no proxy
from the environment.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from mmit import __version__
from mmit.data.generate.settings import Endpoint
from mmit.data.order import key
from mmit.errors import ConfigError

MAX_WAIT = 60.0
MAX_RETRY_AFTER = 600.0
_MAX_REPLY = 16 << 20
_AGAIN = (408, 409, 425, 429)
_OUR_MISTAKE = {401: "the key is not accepted", 403: "access is denied", 404: "there is no such model or address"}


class RefusedError(Exception):
    """The server will not answer this request, however often it is asked."""


class UnreachableError(Exception):
    """All tries of a request failed."""


class StoppedError(Exception):
    """The run is ending; the request was not sent again."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer and what it cost. ``is_counted``: the server stated the usage."""

    text: str
    is_whole: bool
    prompt_tokens: int
    completion_tokens: int
    is_counted: bool


class Client:
    """Asks one endpoint from several threads; a server that is busy holds all of them back."""

    def __init__(self, endpoint: Endpoint, api_key: str) -> None:
        self.endpoint = endpoint
        self.stop = threading.Event()
        self._key = api_key
        self._not_before = 0.0
        parts = urlsplit(endpoint.base_url)
        self._host, self._port = parts.hostname or "", parts.port
        self._path = f"{parts.path.rstrip('/')}/chat/completions"
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None

    @property
    def settings(self) -> dict[str, Any]:
        """The part of a request that is the same for all."""
        own = {name: getattr(self.endpoint, name) for name in ("model", "temperature", "max_tokens")}
        return {**self.endpoint.body, **own}

    def ask(self, messages: list[Any]) -> Reply:
        """The answer to a list of messages.

        Raises RefusedError, UnreachableError, StoppedError; ConfigError where no request could ever succeed.
        """
        body = json.dumps({**self.settings, "messages": messages}).encode()
        reason = ""
        for attempt in range(self.endpoint.tries):
            self._wait(self._not_before - time.monotonic())
            wait = self._back_off(attempt, body)
            try:
                status, headers, content = self._post(body)
            except (OSError, http.client.HTTPException) as error:
                reason = f"{type(error).__name__}: {error}"
            else:
                if status == http.client.OK:
                    reply = _reply(content)
                    if reply is not None:
                        return reply
                    reason = f"a reply that is no chat completion: {self._shown(content)}"
                else:
                    reason = f"HTTP {status}: {self._shown(content)}"
                    self._check(status, reason)
                    asked = _retry_after(headers)
                    if asked > MAX_RETRY_AFTER:
                        raise UnreachableError(f"{reason}; the server asks to wait for {asked:.0f} s")
                    wait = max(wait, asked)
                    if status == http.client.TOO_MANY_REQUESTS:
                        self._not_before = max(self._not_before, time.monotonic() + wait)
            if attempt + 1 < self.endpoint.tries:
                self._wait(wait)
        raise UnreachableError(f"{self.endpoint.tries} tries failed, the last with {reason}")

    def _post(self, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
        deadline = time.monotonic() + self.endpoint.timeout
        if self._tls is None:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=self.endpoint.timeout)
        else:
            connection = http.client.HTTPSConnection(
                self._host, self._port, timeout=self.endpoint.timeout, context=self._tls
            )
        headers = {"Content-Type": "application/json", "User-Agent": f"mmit/{__version__}"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            connection.connect()
            socket = connection.sock
            connection.request("POST", self._path, body, headers)
            response = connection.getresponse()
            content = b""
            while piece := response.read1(1 << 16):
                content += piece
                left = deadline - time.monotonic()
                if left <= 0 or len(content) > _MAX_REPLY:
                    raise TimeoutError(f"the reply did not end within {self.endpoint.timeout:g} s and 16 MiB")
                # a socket's own limit is for one read: a server that sends a byte now and then would never reach it
                socket.settimeout(left)
            return response.status, {k.lower(): v for k, v in response.getheaders()}, content
        finally:
            connection.close()

    def _check(self, status: int, reason: str) -> None:
        """Raise for a status that another try does not change."""
        if status in _OUR_MISTAKE:
            raise ConfigError(f"{self.endpoint.base_url}: {_OUR_MISTAKE[status]}: {reason}")
        if status < 500 and status not in _AGAIN:
            raise RefusedError(reason)

    def _back_off(self, attempt: int, body: bytes) -> float:
        """Seconds: doubled with every try, with a jitter of half of it that differs between requests."""
        jitter = int(key("wait", attempt, hash(body), threading.get_ident())) / 2**64
        return min(MAX_WAIT, self.endpoint.first_wait * 2.0**attempt) * (0.5 + 0.5 * jitter)

    def _wait(self, seconds: float) -> None:
        if self.stop.is_set() or (seconds > 0 and self.stop.wait(seconds)):
            raise StoppedError

    def _shown(self, content: bytes) -> str:
        """The start of a reply, for messages; a key that the server repeats does not go with it."""
        text = " ".join(content.decode("utf-8", "replace").split())
        return (text.replace(self._key, "***") if self._key else text)[:200]


def _reply(content: bytes) -> Reply | None:
    """The first choice of a chat completion; None where the content is none."""
    try:
        found = json.loads(content)
        choice = found["choices"][0]
        text = choice["message"].get("content")
        usage = found.get("usage") or {}
        prompt, completion = int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0))
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    if text is not None and not isinstance(text, str):
        return None
    return Reply(
        text=text or "",
        is_whole=choice.get("finish_reason") in (None, "stop"),
        prompt_tokens=prompt,
        completion_tokens=completion,
        is_counted="prompt_tokens" in usage,
    )


def _retry_after(headers: Mapping[str, str]) -> float:
    """The seconds that a ``Retry-After`` header asks for, as a number or as a date; 0 without one."""
    value = headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0
