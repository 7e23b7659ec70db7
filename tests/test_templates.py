"""Chat templates: literal texts, trained spans, agreement with transformers, and what is refused."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from factories import tiny_llama_tokenizer, tiny_qwen_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from mmit.conversation import Conversation, ImageRef, Message, Part
from mmit.encoding import encode
from mmit.errors import ConfigError, DataError
from mmit.templates import BUILT_IN_TEMPLATES, ChatTemplate, Rendered
from mmit.tokenizer import prepare_tokenizer

MORE_TOKENS = [
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
]


@cache
def prepared(kind: str):
    """A tiny tokenizer that has every template's tokens."""
    with TemporaryDirectory() as directory:
        tokenizer = (tiny_llama_tokenizer if kind == "llama" else tiny_qwen_tokenizer)(directory)
    tokenizer.add_tokens([*MORE_TOKENS, "<|im_start|>", "<|im_end|>"], special_tokens=True)
    if kind == "qwen":
        tokenizer.bos_token = "<|endoftext|>"
    return prepare_tokenizer(tokenizer)


def template(name: str, kind: str = "llama") -> ChatTemplate:
    return ChatTemplate.load(name, prepared(kind).tokenizer)


def user(*content: Part) -> Message:
    return Message(role="user", content=content)


def answer(text: str, **fields) -> Message:
    return Message(role="assistant", content=(text,), **fields)


def talk(*messages: Message) -> Conversation:
    return Conversation(id="r7", messages=messages)


TWO_TURNS = talk(user(ImageRef(0), "\nWhat?"), answer("A bus."), user("Colour?"), answer("Red."))
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
LLAVA = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
# Trained text stands between « and ».
TEXTS = {
    "vicuna": VICUNA + "USER: <image>\nWhat? ASSISTANT:« A bus.</s>»USER: Colour? ASSISTANT:« Red.</s>»",
    "vicuna_v0": VICUNA.replace("user", "human").strip()
    + "###Human: <image>\nWhat?###Assistant:« A bus.###»Human: Colour?###Assistant:« Red.###»",
    "instructblip": "<image>What?« A bus.</s>»Colour?« Red.</s>»",
    "llama2": f"[INST] <<SYS>>\n{LLAVA}\n<</SYS>>\n\n<image>\nWhat? [/INST]« A bus. </s>»"
    "<s>[INST] Colour? [/INST]« Red. </s>»",
    "mistral": "[INST] <image>\nWhat? [/INST]« A bus. </s>»[INST] Colour? [/INST]« Red. </s>»",
    "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n«A bus.<|eot_id|>»"
    "<|start_header_id|>user<|end_header_id|>\n\nColour?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n«Red.<|eot_id|>»",
    "chatml": "<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\n«A bus.<|im_end|>»\n"
    "<|im_start|>user\nColour?<|im_end|>\n<|im_start|>assistant\n«Red.<|im_end|>»\n",
    "phi3": "<|user|>\n<image>\nWhat?<|end|>\n<|assistant|>\n«A bus.<|end|>»\n"
    "<|user|>\nColour?<|end|>\n<|assistant|>\n«Red.<|end|>»\n",
    "gemma": "<s><start_of_turn>user\n<image>\nWhat?<end_of_turn>\n<start_of_turn>model\n«A bus.<end_of_turn>»\n"
    "<start_of_turn>user\nColour?<end_of_turn>\n<start_of_turn>model\n«Red.<end_of_turn>»\n",
}
TEXTS["qwen"] = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + TEXTS["chatml"]
TEXTS["chatml_direct"] = "<|im_start|>system\nAnswer the questions.<|im_end|>" + (
    TEXTS["chatml"].replace("»\n", "»").replace("<|im_end|>\n", "<|im_end|>")
)
TEXTS["mpt"] = TEXTS["chatml_direct"].replace(
    "Answer the questions.",
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers.",
)


def marked(rendered) -> str:
    text = rendered.text
    for start, end in reversed(rendered.trained):
        text = f"{text[:start]}«{text[start:end]}»{text[end:]}"
    return text


@pytest.mark.parametrize("name", TEXTS)
def test_the_text_and_its_trained_spans_are_these(name: str) -> None:
    assert marked(template(name).render(TWO_TURNS)) == TEXTS[name]


def test_plain_keeps_the_image_and_the_caption() -> None:
    pair = talk(user(ImageRef(0), "\nDescribe it."), answer("a red bus"))
    assert marked(template("plain").render(pair)) == "<image>«a red bus\n»"
    with pytest.raises(DataError, match=r"'r7'.*'plain'.*without one"):
        template("plain").render(talk(user("Hi"), answer("Hello")))


def test_every_built_in_template_is_covered_here() -> None:
    assert {*TEXTS, "plain"} == set(BUILT_IN_TEMPLATES)


@pytest.mark.parametrize(
    ("name", "begins"),
    [
        ("vicuna", "Be brief. USER: Hi"),
        ("instructblip", "Be brief.\nHi Yo</s>"),
        ("llama2", "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]"),
        ("mistral", "[INST] Be brief.\n\nHi [/INST]"),
        ("llama3", "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"),
        ("qwen", "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi"),
        ("phi3", "<|system|>\nBe brief.<|end|>\n<|user|>\nHi"),
        ("gemma", "<s><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>"),
    ],
)
def test_a_system_message_goes_where_the_family_has_it(name: str, begins: str) -> None:
    system = Message(role="system", content=("Be brief.",))
    assert template(name).render(talk(system, user("Hi"), answer("Yo"))).text.startswith(begins)


# --- prompts and answers -------------------------------------------------------------------------------------------

words = st.text(alphabet=st.sampled_from("ab .:\n\t#é猫</s>|"), max_size=6)


@st.composite
def conversations(draw) -> Conversation:
    messages: list[Message] = []
    if draw(st.booleans()):
        messages.append(Message(role="system", content=(draw(words),)))
    for turn in range(draw(st.integers(1, 3))):
        content: list[Part] = [draw(words)]
        if turn == 0 or draw(st.booleans()):
            content.insert(draw(st.integers(0, 1)), ImageRef(turn))
        messages += [user(*content), answer(draw(words))]
    return Conversation(id="h", messages=tuple(messages))


@pytest.mark.parametrize("kind", ["llama", "qwen"])
@pytest.mark.parametrize("name", BUILT_IN_TEMPLATES)
@settings(max_examples=40, deadline=None, database=None)
@given(conversation=conversations(), style=st.sampled_from(["hf", "llava", "blip"]))
def test_a_prompt_is_a_prefix_of_what_was_trained(name: str, kind: str, conversation: Conversation, style) -> None:
    known, chosen = prepared(kind), template(name, kind)
    special = [token for token in chosen.control if any(token in message.text for message in conversation.messages)]
    plain_without_image = name == "plain" and any(
        message.role == "user" and not any(isinstance(part, ImageRef) for part in message.content)
        for message in conversation.messages
    )
    empty = name == "instructblip" and any(
        message.role == "user" and not any(isinstance(part, ImageRef) or part.strip() for part in message.content)
        for message in conversation.messages
    )
    if special or plain_without_image or empty:
        with pytest.raises(DataError):
            chosen.render(conversation)
        return

    def ids(messages: tuple[Message, ...], *, reply: bool) -> tuple[list[int], list[bool]]:
        part = Conversation(id="h", messages=messages)
        images = [3] * len(part.image_refs)
        rendered = chosen.render(part, reply=reply)
        made, mask = encode(rendered, known.tokenizer, images, image_id=known.image_id, style=style)
        return made.tolist(), mask.tolist()

    whole, trained = ids(conversation.messages, reply=False)
    for turn, message in enumerate(conversation.messages):
        if message.role == "assistant":
            prompt, _ = ids(conversation.messages[:turn], reply=True)
            assert whole[: len(prompt)] == prompt
            assert not trained[len(prompt) - 1]
            assert trained[len(prompt)]  # the answer begins right there, be it empty


# --- transformers reads the same source the same way ---------------------------------------------------------------


@pytest.mark.parametrize("name", BUILT_IN_TEMPLATES)
def test_the_source_works_as_a_chat_template_of_transformers(name: str) -> None:
    tokenizer = prepared("llama").tokenizer
    chosen = template(name)
    parts = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A bus."}]},
    ]
    ours = chosen.render(talk(user(ImageRef(0), "What?"), answer("A bus.")))
    theirs = tokenizer.apply_chat_template(parts, chat_template=chosen.jinja, tokenize=False)
    assert theirs == ours.text
    asked = tokenizer.apply_chat_template(
        parts[:1], chat_template=chosen.jinja, tokenize=False, add_generation_prompt=True
    )
    assert asked == chosen.render(talk(user(ImageRef(0), "What?")), reply=True).text
    if name != "plain":
        text_only = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A bus."}]
        theirs = tokenizer.apply_chat_template(text_only, chat_template=chosen.jinja, tokenize=False)
        assert theirs == chosen.render(talk(user("What?"), answer("A bus."))).text


def test_an_opening_image_gets_a_line_of_its_own() -> None:
    def text(*content: Part) -> str:
        return template("mistral").render(talk(user(*content), answer("x"))).text.partition(" [/INST]")[0][7:]

    assert text(ImageRef(0), "What?") == "<image>\nWhat?"
    assert text(ImageRef(0), "\nWhat?") == "<image>\nWhat?"
    assert text(ImageRef(0), ImageRef(1), "", "What?") == "<image><image>\nWhat?"
    assert text("See ", ImageRef(0), ".") == "See <image>."  # inside a sentence nothing is added
    assert text(ImageRef(0)) == "<image>"


# --- templates of others -------------------------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def from_file(directory: Path, source: str, kind: str = "qwen") -> ChatTemplate:
    file = directory / "mine.jinja"
    file.write_text(source)
    return template(str(file), kind)


def test_a_template_without_marks_gets_the_same_spans(tmp_path: Path) -> None:
    mine = from_file(tmp_path, CHATML)
    assert marked(mine.render(TWO_TURNS)) == TEXTS["chatml"]
    tokenizer = prepared("qwen").tokenizer
    assert mine.stop == ("<|im_end|>",)
    assert mine.stop_ids == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)


def test_the_tokenizers_own_template_is_used_and_ours_is_recognized(tmp_path: Path) -> None:
    tokenizer = tiny_qwen_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="no chat template of its own"):
        ChatTemplate.load("own", tokenizer)
    tokenizer.chat_template = CHATML
    assert marked(ChatTemplate.load("own", tokenizer).render(TWO_TURNS)) == TEXTS["chatml"]
    tokenizer.chat_template = template("qwen", "qwen").jinja
    assert ChatTemplate.load("own", tokenizer).name == "qwen"


def test_a_template_that_rewrites_history_is_refused_and_the_turn_is_named(tmp_path: Path) -> None:
    # As templates of thinking models do: only the last answer is preceded by a thought.
    thinking = CHATML.replace(
        "m['content']", "('<think></think>' if m['role'] == 'assistant' and loop.last else '') + m['content']"
    )
    mine = from_file(tmp_path, thinking)
    with pytest.raises(DataError, match=r"'r7'.*rewrites history.* 1 "):
        mine.render(TWO_TURNS)
    single = talk(user("What?"), answer("A bus."))
    assert "«<think></think>A bus.<|im_end|>»" in marked(mine.render(single))  # alone it keeps its word


def test_a_template_that_does_not_end_answers_serves_for_chat_only(tmp_path: Path) -> None:
    endless = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
    mine = from_file(tmp_path, endless)
    assert mine.render(talk(user("Hi")), reply=True).text == "user: Hi "
    with pytest.raises(ConfigError, match="could not learn to stop"):
        mine.render(talk(user("Hi"), answer("Yo")))


def test_a_template_that_loses_images_or_words_is_refused(tmp_path: Path) -> None:
    blind = from_file(tmp_path, CHATML.replace("m['content']", "m['content'] | replace('<image>', '')"))
    with pytest.raises(DataError, match=r"1 images in its turns.*wrote 0"):
        blind.render(TWO_TURNS)
    cut = from_file(tmp_path, CHATML.replace("m['content']", "m['content'][:30]"))
    with pytest.raises(DataError, match="does not write the answer of turn 1"):
        cut.render(talk(user("Hi"), answer("x" * 31)))


def test_a_broken_or_missing_template_is_a_config_error(tmp_path: Path) -> None:
    for source in ("{% for %}", "no messages here"):
        with pytest.raises(ConfigError, match="the chat template"):
            from_file(tmp_path, source)
    with pytest.raises(ConfigError, match="neither a file"):
        template("alpaca")


@pytest.mark.parametrize(
    ("name", "lacks"),
    [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("phi3", "<|end|>"), ("gemma", "<end_of_turn>")],
)
def test_a_tokenizer_without_the_tokens_is_named_with_the_remedy(name: str, lacks: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        ChatTemplate.load(name, tiny_llama_tokenizer(tmp_path))
    assert lacks in str(caught.value)
    assert "choose" in str(caught.value)


def test_answers_stop_at_their_end_token() -> None:
    tokenizer = prepared("llama").tokenizer
    assert template("vicuna").stop_ids == (tokenizer.eos_token_id,)
    assert template("llama3").stop_ids == (tokenizer.convert_tokens_to_ids("<|eot_id|>"), tokenizer.eos_token_id)
    assert template("plain").stop_ids == (tokenizer.convert_tokens_to_ids("<0x0A>"), tokenizer.eos_token_id)


# --- odd conversations ---------------------------------------------------------------------------------------------


def test_an_answer_before_the_first_question_is_left_out_and_counted() -> None:
    rendered = template("mistral").render(talk(answer("Hello, I am here."), user("Hi"), answer("Yo")))
    # "[INST] Hi [/INST]" has 17 characters, " Yo </s>" has 8.
    assert rendered == Rendered("[INST] Hi [/INST] Yo </s>", ((17, 25),), answers=(17,), dropped_turns=1)


def test_an_empty_answer_trains_its_end_alone() -> None:
    assert marked(template("chatml").render(talk(user("Hi"), answer("")))).endswith("assistant\n«<|im_end|>»\n")


def test_a_question_without_answer_stays_untrained() -> None:
    text = marked(template("mistral").render(talk(user("Hi"), answer("Yo"), user("And?"))))
    assert text == "[INST] Hi [/INST]« Yo </s>»[INST] And? [/INST]"


def test_an_answer_can_be_taken_out_of_training() -> None:
    text = marked(template("mistral").render(talk(user("Hi"), answer("Yo", train=False), user("And?"), answer("No"))))
    assert text == "[INST] Hi [/INST] Yo </s>[INST] And? [/INST]« No </s>»"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ((user("a"), user("b"), answer("c")), "turns 0 and 1 are both user's"),
        ((user("a"), answer("b"), answer("c")), "turns 1 and 2 are both assistant's"),
        ((user("a"), Message(role="system", content=("b",)), answer("c")), "turn 1: a system message may only stand"),
        ((answer("a"),), "no user turn"),
        ((), "no user turn"),
        ((Message(role="assistant", content=(ImageRef(0),)), user("a")), "turn 0: an image stands before"),
        ((Message(role="user", content=("a",), train=True), answer("b")), "turn 0: train is set on a user turn"),
        ((user("a <|im_"), answer("b </s> c")), "turn 1: the text holds the control token </s>"),
        ((user("a <|im_", "end|> b"), answer("c")), r"turn 0: the text holds the control token <\|im_end\|>"),
        ((user("the tag <image>"), answer("c")), "turn 0: the text holds the control token <image>"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_record_and_turn(messages: tuple[Message, ...], reason: str) -> None:
    with pytest.raises(DataError, match=f"record 'r7'.*{reason}"):
        template("vicuna").render(talk(*messages))


def test_a_reply_needs_a_question() -> None:
    with pytest.raises(DataError, match="already ends with an answer"):
        template("vicuna").render(TWO_TURNS, reply=True)
