"""Chat templates: from a conversation to text, and to the spans of that text that are trained.

Everything is Jinja, rendered by transformers' own sandbox: the tokenizer's template (``own``), a ``*.jinja`` file, or
one of those built in (``chat_templates/``). Text and spans are born together. A built-in template marks its answers
with ``{% generation %}``; of any other the answers are found by rendering the conversation up to each of them, which
also shows whether the template keeps its word: what the model reads before it answers is what it was trained on.
What becomes of odd conversations is said in turns.py, for all templates alike.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from mmit.conversation import Conversation, ImageRef, Message
from mmit.errors import ConfigError, DataError
from mmit.tokenizer import IMAGE_TEXT, control_tokens, is_single_token, token_id
from mmit.turns import Turn, as_text, refuse_control_tokens, turns_to_render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_EOS, _BOS = "eos_token", "bos_token"
_CHATML = ("<|im_start|>", "<|im_end|>")
_PHI3 = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
_LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
# name: (what ends an answer, tokens that the tokenizer must have)
_BUILT_IN: dict[str, tuple[str, tuple[str, ...]]] = {
    "plain": ("\n", ()),
    "vicuna": (_EOS, (_EOS,)),
    "vicuna_v0": ("###", ()),
    "instructblip": (_EOS, (_EOS,)),
    "llama2": (_EOS, (_BOS, _EOS)),
    "mistral": (_EOS, (_EOS,)),
    "llama3": ("<|eot_id|>", _LLAMA3),
    "chatml": ("<|im_end|>", _CHATML),
    "qwen": ("<|im_end|>", _CHATML),
    "mpt": ("<|im_end|>", _CHATML),
    "chatml_direct": ("<|im_end|>", _CHATML),
    "phi3": ("<|end|>", _PHI3),
    "gemma": ("<end_of_turn>", ("<start_of_turn>", "<end_of_turn>")),
}
BUILT_IN_TEMPLATES = tuple(_BUILT_IN)
"""Names that ``ChatTemplate.load`` knows beside ``own`` and paths of Jinja files."""
_NAMES = ", ".join(BUILT_IN_TEMPLATES)


@dataclass(frozen=True)
class Rendered:
    """A conversation as text. Each image stands in it as ``<image>``.

    trained: spans (start, end) of characters that the loss looks at, in order; none in the prompt for a reply.
    answers: where each answer begins, trained or not; no token may reach across, for a prompt ends there.
    dropped_turns: assistant turns before the first user turn that were left out.
    """

    text: str
    trained: tuple[Span, ...]
    answers: tuple[int, ...] = ()
    dropped_turns: int = 0


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A chat template together with what it needs to know of its tokenizer; made by ``load``.

    jinja: the source; usable as ``tokenizer.chat_template`` in transformers, where it gives the same text.
    stop: the text that ends an answer; empty where the template writes none (then it serves for chat only).
    stop_ids: ids of tokens that end an answer; the tokenizer's end token is always among them.
    """

    name: str
    jinja: str
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...]
    variables: tuple[tuple[str, str], ...]
    control: frozenset[str]
    takes_parts: bool
    is_built_in: bool

    @classmethod
    def load(cls, name_or_path: str, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
        """The template of this name for this tokenizer: ``own``, the path of a ``*.jinja`` file, or a built-in name.

        Raises ConfigError if there is none, it does not compile, or the tokenizer lacks a token that it needs.
        """
        if name_or_path in _BUILT_IN:
            return cls._built_in(name_or_path, tokenizer)
        if name_or_path == "own":
            source = tokenizer.chat_template
            if not isinstance(source, str):
                raise ConfigError(f"the tokenizer has no chat template of its own; name one of {_NAMES}")
        else:
            source = _read(name_or_path)
        known = next((name for name in BUILT_IN_TEMPLATES if built_in_source(name) == source), None)
        if known:  # a model directory of ours carries one of them as the tokenizer's own
            return cls._built_in(known, tokenizer)
        return cls._foreign(name_or_path, source, tokenizer)

    @classmethod
    def _built_in(cls, name: str, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
        stop, needed = _BUILT_IN[name]
        texts = {token: getattr(tokenizer, token) if token in (_EOS, _BOS) else token for token in (stop, *needed)}
        missing = [token for token in needed if not texts[token] or not is_single_token(tokenizer, texts[token])]
        if missing:
            raise ConfigError(
                f"the tokenizer lacks {', '.join(missing)}, which the chat template '{name}' needs; choose the "
                "template this language model was trained with ('own'), or one that needs its end token only ('vicuna')"
            )
        return cls(
            name=name,
            jinja=built_in_source(name),
            stop=(texts[stop],),
            stop_ids=_stop_ids(tokenizer, texts[stop]),
            variables=_variables(tokenizer),
            control=control_tokens(tokenizer),
            takes_parts=True,
            is_built_in=True,
        )

    @classmethod
    def _foreign(cls, name: str, source: str, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
        control, variables = control_tokens(tokenizer), _variables(tokenizer)
        takes_parts, end = _probe(name, source, dict(variables), control)
        return cls(
            name=name,
            jinja=source,
            stop=(end,) if end else (),
            stop_ids=_stop_ids(tokenizer, end),
            variables=variables,
            control=control,
            takes_parts=takes_parts,
            is_built_in=False,
        )

    def render(self, conversation: Conversation, *, reply: bool = False) -> Rendered:
        """The text of a conversation and its trained spans.

        reply: end with the prompt for the assistant's next answer; the last turn must then be the user's.
        Raises DataError, naming the record, for a conversation that breaks a rule of this module.
        """
        turns, dropped = turns_to_render(conversation)
        refuse_control_tokens(turns, self.control, conversation.id)
        if reply and turns[-1][1].role == "assistant":
            raise DataError(f"record '{conversation.id}' already ends with an answer; ask for a reply to a user turn")
        messages = [self._message(turn) for _, turn in turns]
        try:
            text, marked = _render(self.jinja, messages, dict(self.variables), reply=reply)
            if self.is_built_in:
                spans = marked
            elif reply:
                spans = self._earlier_answers(text, messages)
            else:
                spans = self._answers(text, marked, messages, turns, conversation.id)
        except TemplateError as error:
            raise DataError(
                f"record '{conversation.id}': the chat template '{self.name}' refuses it: {error}"
            ) from error
        images = sum(isinstance(part, ImageRef) for _, turn in turns for part in turn.content)
        if text.count(IMAGE_TEXT) != images:
            raise DataError(
                f"record '{conversation.id}' has {images} images in its turns, but the chat template '{self.name}' "
                f"wrote {text.count(IMAGE_TEXT)} {IMAGE_TEXT}; choose a template that writes one for each image"
            )
        starts = tuple(start for start, _ in spans)
        if reply:
            return Rendered(text, (), starts, dropped)
        answers = [turn for _, turn in turns if turn.role == "assistant"]
        assert len(answers) == len(spans), f"{len(answers)} answers, {len(spans)} spans"
        trained = tuple(span for turn, span in zip(answers, spans, strict=True) if turn.is_trained)
        return Rendered(text, trained, starts, dropped)

    def _message(self, turn: Message) -> dict[str, Any]:
        is_text = not any(isinstance(part, ImageRef) for part in turn.content)
        if not self.takes_parts or (self.is_built_in and is_text):  # no list to loop over: half the time
            return {"role": turn.role, "content": as_text(turn.content)}
        parts = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in turn.content]
        return {"role": turn.role, "content": parts}

    def _earlier_answers(self, text: str, messages: list[dict[str, Any]]) -> list[Span]:
        """Where the answers of a prompt begin, as far as the template keeps to what it wrote before them."""
        indices = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        prompts = [_render(self.jinja, messages[:index], dict(self.variables), reply=True)[0] for index in indices]
        return [(len(prompt), len(prompt)) for prompt in prompts if text.startswith(prompt)]

    def _answers(
        self, text: str, marked: list[Span], messages: list[dict[str, Any]], turns: Sequence[Turn], record: str
    ) -> list[Span]:
        """The span of each answer and its end: as marked, else found by rendering the conversation up to it."""
        if not self.stop:
            raise ConfigError(
                f"the chat template '{self.name}' writes nothing after an answer, so a model could not learn to stop; "
                "add its end-of-turn token, or train with another template"
            )
        answers = [(index, number, turn) for index, (number, turn) in enumerate(turns) if turn.role == "assistant"]
        if marked and len(marked) != len(answers):
            raise DataError(
                f"record '{record}': the chat template '{self.name}' marks {len(marked)} of {len(answers)} answers "
                "with generation; mark each answer once"
            )
        spans: list[Span] = []
        for index, number, turn in answers:
            prompt, _ = _render(self.jinja, messages[:index], dict(self.variables), reply=True)
            alone, _ = _render(self.jinja, messages[: index + 1], dict(self.variables), reply=False)
            answer = as_text(turn.content).strip()
            start = alone.find(answer, len(prompt))
            end = alone.find(self.stop[0], start + len(answer)) + len(self.stop[0])
            if start < 0 or end < start + len(answer) + len(self.stop[0]):
                raise DataError(
                    f"record '{record}': the chat template '{self.name}' does not write the answer of turn {number} as "
                    f"it stands, ended by {self.stop[0]!r}; use another template for this data"
                )
            if not alone.startswith(prompt) or not text.startswith(alone[:end]):
                raise DataError(
                    f"record '{record}': the chat template '{self.name}' rewrites history: the text up to turn "
                    f"{number} is another once later turns follow; train that turn as the last of its own record, or "
                    "use another template"
                )
            spans.append(marked[len(spans)] if marked else (len(prompt), end))
        return spans


@cache
def built_in_source(name: str) -> str:
    """The Jinja source of a built-in template, complete in itself."""
    folder = resources.files("mmit") / "chat_templates"
    return "".join((folder / f"{file}.jinja").read_text(encoding="utf-8") for file in ("_content", name))


def _read(path: str) -> str:
    file = Path(path).expanduser()
    if file.suffix != ".jinja" or not file.is_file():
        raise ConfigError(f"template '{path}' is neither a file *.jinja nor one of own, {_NAMES}")
    return file.read_text(encoding="utf-8")


def _variables(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[str, str], ...]:
    return tuple((name, str(token)) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str))


def _stop_ids(tokenizer: PreTrainedTokenizerBase, stop: str) -> tuple[int, ...]:
    """The id of ``stop`` as it comes after text, where that is one token, and the end token of the tokenizer."""
    bare = tokenizer.encode("a", add_special_tokens=False)
    ended = tokenizer.encode("a" + stop, add_special_tokens=False)
    ids = [ended[-1]] if ended[:-1] == bare else []
    if isinstance(tokenizer.eos_token, str):
        ids.append(token_id(tokenizer, tokenizer.eos_token))
    return tuple(dict.fromkeys(ids))


def _render(
    source: str, messages: list[dict[str, Any]], variables: dict[str, str], *, reply: bool
) -> tuple[str, list[Span]]:
    """Text, and the spans inside ``{% generation %}``."""
    from transformers.utils.chat_template_utils import render_jinja_template

    settings: dict[str, Any] = {"add_generation_prompt": reply, **variables}
    marks = _MARK.search(source) is not None
    texts, marked = render_jinja_template(
        [messages], None, None, source, return_assistant_tokens_mask=marks, **settings
    )
    spans: list[Any] = list(marked)
    return texts[0], [(start, end) for start, end in spans[0]] if marks else []


def _probe(name: str, source: str, variables: dict[str, str], control: frozenset[str]) -> tuple[bool, str]:
    """Whether contents are to be given as parts, and what the template writes after an answer ("" if nothing)."""
    ask, answer = "Which colour?", "It is teal."

    def rendered(*contents: str, parts: bool) -> str:
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}] if parts else text}
            for role, text in zip(("user", "assistant"), contents, strict=True)
        ]
        return _render(source, messages, variables, reply=False)[0]

    for takes_parts in (False, True):
        try:
            text = rendered(ask, answer, parts=takes_parts)
        except TemplateError as error:
            if takes_parts:
                raise ConfigError(f"the chat template '{name}' cannot be rendered: {error}") from error
            continue
        before, _, after = text.partition(answer)
        if ask in before and "[{" not in text:
            break
    else:
        raise ConfigError(f"the chat template '{name}' does not write the text of a question and its answer")
    rest = after.strip() or after.strip(" ")  # a line feed can end an answer, a space cannot
    end = next((token for token in sorted(control, key=len, reverse=True) if rest.startswith(token)), rest)
    return takes_parts, end
