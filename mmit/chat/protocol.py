"""OpenAI's chat completion protocol: requests checked and turned into conversations, answers and errors into JSON.

Knows no network and no model. A picture arrives as a data URL and as nothing else: a server that fetched addresses or
read paths on behalf of whoever can reach it would hand out what only its host may see.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from mmit.chat.answer import FinishReason, Sampling
from mmit.conversation import Conversation, ImageRef, Message, Part, Role
from mmit.errors import MmitError

Json = dict[str, Any]
_NotEmpty = Annotated[str, Field(min_length=1)]

# What would change the answer and is not done here; these values are what a client sends to leave it alone.
_NOT_DONE: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "tools": ([],),
    "functions": ([],),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
}


class RequestError(MmitError):
    """A request that cannot be answered, with its HTTP status and the field at fault."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow")


class TextPart(_Open):
    """``{"type": "text", "text": ...}``."""

    type: Literal["text"]
    text: str


class ImageUrl(_Open):
    """``{"url": "data:image/png;base64,..."}``."""

    url: str


class ImagePart(_Open):
    """``{"type": "image_url", "image_url": {...}}``."""

    type: Literal["image_url"]
    image_url: ImageUrl


def _as_parts(content: object) -> object:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Turn(_Open):
    """One message; ``developer`` is OpenAI's newer word for ``system``."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], BeforeValidator(_as_parts)]


def _as_list(stop: object) -> object:
    return [] if stop is None else [stop] if isinstance(stop, str) else stop


class StreamOptions(_Open):
    """``{"include_usage": true}`` asks for one more chunk with the token counts."""

    include_usage: bool = False


class ChatRequest(_Open):
    """The body of ``POST /v1/chat/completions``. Greedy unless a temperature is given."""

    model: str | None = None
    messages: list[Turn]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    stop: Annotated[list[_NotEmpty], Field(max_length=16), BeforeValidator(_as_list)] = []
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def sampling(self) -> Sampling:
        """How the answer is chosen."""
        return Sampling(
            max_new_tokens=self.max_completion_tokens or self.max_tokens,
            temperature=self.temperature or 0.0,
            top_p=self.top_p or 1.0,
            stop=tuple(self.stop),
            seed=self.seed,
        )

    @property
    def wants_usage(self) -> bool:
        """True where a stream is to end with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage


def read_request(body: bytes) -> ChatRequest:
    """The request in ``body``. Raises RequestError naming the first field that is wrong."""
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(step) for step in first["loc"])
        message = f"{where}: {first['msg']}" if where else f"the request is not readable: {first['msg']}"
        raise RequestError(message, param=where or None) from None
    for name, value in (request.model_extra or {}).items():
        if name in _NOT_DONE and value is not None and value not in _NOT_DONE[name]:
            raise RequestError(f"{name}: this server does not do that; leave it out", param=name, code="unsupported")
    return request


def read_conversation(request: ChatRequest) -> Conversation:
    """The turns and pictures of a request. Raises RequestError for a picture that is no readable data URL."""
    images: list[bytes] = []
    messages: list[Message] = []
    for number, turn in enumerate(request.messages):
        role: Role = "system" if turn.role == "developer" else turn.role
        content: list[Part] = []
        for place, part in enumerate(turn.content):
            if isinstance(part, TextPart):
                content += [part.text] if part.text else []
                continue
            param = f"messages.{number}.content.{place}.image_url"
            if role != "user":
                raise RequestError(f"{param}: only the user shows images, not the {role}", param=param)
            content.append(ImageRef(len(images)))
            images.append(_data_url(part.image_url.url, param))
        messages.append(Message(role=role, content=tuple(content)))
    return Conversation(id="request", messages=tuple(messages), images=tuple(images))


def _data_url(url: str, param: str) -> bytes:
    head, comma, body = url.partition(",")
    if head[:5].lower() != "data:":
        raise RequestError(
            f"{param}: '{url[:40]}' is not a data URL; this server fetches no addresses and reads no files, so "
            "send the picture itself as data:image/...;base64,...",
            param=param,
        )
    if not comma or not head.lower().endswith(";base64"):
        raise RequestError(f"{param}: the data URL is not base64 (data:image/...;base64,...)", param=param)
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{param}: the base64 of the picture is broken: {error}", param=param) from None


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What every piece of one reply carries."""

    id: str
    created: int
    model: str

    def completion(self, text: str, reason: FinishReason, usage: Json) -> Json:
        """The whole reply at once."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
        return self._head("chat.completion") | {"choices": [choice], "usage": usage}

    def chunk(self, delta: Json, reason: FinishReason | None = None) -> Json:
        """One piece of a streamed reply."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return self._head("chat.completion.chunk") | {"choices": [choice]}

    def usage_chunk(self, usage: Json) -> Json:
        """The last piece of a streamed reply, where the client asked for it."""
        return self._head("chat.completion.chunk") | {"choices": [], "usage": usage}

    def _head(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def usage(prompt_tokens: int, completion_tokens: int) -> Json:
    """Token counts that add up."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def error_body(message: str, *, status: int, param: str | None = None, code: str | None = None) -> Json:
    """The JSON of an error."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
