"""Conversations from Python: the prompt is the trained one, the picture counts, streams equal answers."""

from __future__ import annotations

import io
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chat_pictures import bomb, picture
from PIL import Image

from mmit.batch import collate
from mmit.chat import Chat
from mmit.chat.answer import Sampling, answer
from mmit.conversation import Conversation, ImageRef, Message
from mmit.encoding import encode_conversation
from mmit.errors import CheckpointError, ConfigError, DataError
from mmit.models.loaded import LoadedModel
from mmit.models.prompts import encode_prompt, read_prompt

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


def user(*content: str | ImageRef) -> Message:
    return Message(role="user", content=content)


def conversation(*messages: Message, images: tuple[bytes, ...] = ()) -> Conversation:
    return Conversation(id="test", messages=messages, images=images)


def text_of(loaded: LoadedModel, ids: list[int]) -> str:
    text = loaded.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text.strip()


def stopping_at(loaded: LoadedModel, *, stop_ids: tuple[int, ...]) -> LoadedModel:
    return replace(loaded, template=replace(loaded.template, stop_ids=stop_ids))


# ------------------------------------------------------------------------------------------------- prompt


def test_the_prompt_of_a_second_turn_is_the_text_that_vicuna_was_trained_on(llama: Chat) -> None:
    first = llama.ask("What colour is the circle?", [picture("red")], max_new_tokens=6)
    second = conversation(*llama.messages, user("And the square?"), images=(picture("red"),))
    text = f"{SYSTEM}USER: <image>\nWhat colour is the circle? ASSISTANT: {first}</s>USER: And the square? ASSISTANT:"
    tokenizer, image_id = llama.loaded.tokenizer, llama.loaded.image_id
    ids = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
    place = ids.index(image_id)
    # 28 pixels in patches of 14: four image tokens
    assert read_prompt(llama.loaded, second).input_ids.tolist() == [*ids[:place], *[image_id] * 4, *ids[place + 1 :]]


def test_the_prompt_is_a_prefix_of_the_training_ids(chat: Chat) -> None:
    asked = (user(ImageRef(0), "How many?"), Message(role="assistant", content=("Two.",)), user("And", ImageRef(1)))
    images = (picture("red"), picture("blue"))
    prompt = read_prompt(chat.loaded, conversation(*asked, images=images)).input_ids.tolist()
    trained = encode_conversation(
        conversation(*asked, Message(role="assistant", content=("Three.",)), images=images),
        template=chat.loaded.template,
        tokenizer=chat.loaded.tokenizer,
        spec=chat.loaded.model.spec,
        image_id=chat.loaded.image_id,
        style=chat.loaded.style,
    )
    assert trained.input_ids.tolist()[: len(prompt)] == prompt
    # The first token that is trained after the prompt is the first after it: nothing of the answer is in the prompt.
    assert trained.labels[len(prompt) - 1] == trained.input_ids[len(prompt)]


def test_a_black_and_a_white_picture_change_the_logits_of_the_answer(chat: Chat) -> None:
    def logits(colour: str) -> torch.Tensor:
        asked = conversation(user(ImageRef(0), "Which colour?"), images=(picture(colour),))
        batch = collate(
            [[encode_prompt(chat.loaded, asked)]], pad_id=chat.loaded.pad_id, image_size=chat.loaded.model.spec.size
        )
        with torch.no_grad():
            return chat.loaded.model.logits(batch)[0, -1]

    assert (logits("black") - logits("white")).abs().max() > 0.05
    torch.testing.assert_close(logits("black"), logits("black"), rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------- answers


def test_the_answer_is_what_the_model_generates_from_the_prompt(chat: Chat) -> None:
    asked = conversation(user(ImageRef(0), "What is in the picture?"), images=(picture("green"),))
    ids = chat.loaded.model.generate(
        encode_prompt(chat.loaded, asked),
        max_new_tokens=16,
        stop_ids=chat.loaded.template.stop_ids,
    )
    text = text_of(chat.loaded, ids)
    assert chat.ask("What is in the picture?", [picture("green")], max_new_tokens=16) == text


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_the_pieces_of_a_stream_join_to_the_answer(chat: Chat, temperature: float) -> None:
    asked = ("Describe the image.", [picture("red")])
    whole = chat.ask(*asked, max_new_tokens=24, temperature=temperature, top_p=0.9, seed=7)
    chat.reset()
    pieces = list(chat.stream(*asked, max_new_tokens=24, temperature=temperature, top_p=0.9, seed=7))
    assert "".join(pieces) == whole
    assert len(pieces) > 3


def test_a_seed_draws_the_same_answer_and_leaves_the_global_generator_alone(llama: Chat) -> None:
    asked = conversation(user("How many?"))
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    drawn = [
        "".join(answer(llama.loaded, asked, Sampling(temperature=2.0, seed=s, max_new_tokens=12))) for s in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.rand(1) == expected


def test_pictures_may_come_in_a_later_turn_and_several_at_once(chat: Chat) -> None:
    chat.ask("How are you?", max_new_tokens=3)
    chat.ask("What is this?", [picture("red")], max_new_tokens=3)
    chat.ask("And these?", [picture("blue"), picture("green")], max_new_tokens=3)
    assert [m.content[:-1] for m in chat.messages if m.role == "user"] == [
        (),
        (ImageRef(0),),
        (ImageRef(1), ImageRef(2)),
    ]


def test_a_picture_is_the_same_as_path_bytes_or_pillow_image(llama: Chat, tmp_path: Path) -> None:
    data = picture((200, 30, 30))
    (tmp_path / "red.png").write_bytes(data)
    sources = [data, tmp_path / "red.png", str(tmp_path / "red.png"), Image.open(io.BytesIO(data))]
    answers = {Chat(llama.loaded).ask("What?", [source], max_new_tokens=8) for source in sources}
    assert len(answers) == 1


def test_a_pillow_image_is_turned_upright_and_any_mode_is_taken(llama: Chat) -> None:
    photo = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated by 90 degrees
    left_right = Image.new("RGB", (30, 20), "black")
    left_right.paste("white", (0, 0, 15, 20))
    left_right.save(photo, "PNG", exif=exif)
    tiles = []
    for source in (photo.getvalue(), Image.open(photo), Image.open(photo).convert("CMYK")):
        chat = Chat(llama.loaded)
        chat.ask("What?", [source], max_new_tokens=1)
        tiles.append(chat.loaded.model.spec.prepare(chat._images[0]))
    assert torch.equal(tiles[0], tiles[1])
    assert (tiles[0].int() - tiles[2].int()).abs().max() <= 1  # black and white survive CMYK
    assert tiles[0][0, 0, 2].float().mean() != tiles[0][0, 0, -3].float().mean()  # halves are above each other now


# ------------------------------------------------------------------------------------------------- ends


def test_a_stop_token_ends_the_answer_and_is_not_part_of_it(llama: Chat) -> None:
    asked = conversation(user("Describe the image."))
    limit = Sampling(max_new_tokens=8)
    ids: list[int] = llama.loaded.model.generate(encode_prompt(llama.loaded, asked), max_new_tokens=8)
    stop = next(place for place in range(2, 8) if ids[place] not in ids[:place])
    reply = answer(stopping_at(llama.loaded, stop_ids=(ids[stop],)), asked, limit)
    assert "".join(reply) == text_of(llama.loaded, ids[:stop])
    assert (reply.finish_reason, reply.completion_tokens) == ("stop", stop)


def test_a_stop_string_ends_the_answer_and_the_model(llama: Chat) -> None:
    asked = conversation(user("Describe the image."))
    whole = "".join(answer(llama.loaded, asked, Sampling(max_new_tokens=40)))
    reply = answer(llama.loaded, asked, Sampling(max_new_tokens=1500, stop=(whole[10:13],)))
    assert "".join(reply) == whole[: whole.index(whole[10:13])].strip()
    assert reply.finish_reason == "stop"
    assert reply.completion_tokens <= 40


def test_the_limit_ends_the_answer_as_length(llama: Chat) -> None:
    reply = answer(llama.loaded, conversation(user("Describe the image.")), Sampling(max_new_tokens=5))
    assert reply.finish_reason is None
    list(reply)
    assert (reply.finish_reason, reply.completion_tokens) == ("length", 5)


def test_leaving_a_stream_stops_the_model_and_keeps_what_was_said(llama: Chat) -> None:
    pieces = llama.stream("Describe the image.", max_new_tokens=1500)
    said = next(pieces) + next(pieces)
    pieces.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("answer")]
    assert llama.messages[-1].text == said
    assert len(llama.messages) == 2
    llama.reset()
    assert llama.messages == ()


def test_a_conversation_beyond_the_context_is_refused_with_both_numbers(llama: Chat) -> None:
    prompt = read_prompt(llama.loaded, conversation(user("How many?"))).length
    with pytest.raises(DataError, match=rf"{prompt} tokens and 2048 new ones are wanted.*context holds 2048"):
        llama.ask("How many?", max_new_tokens=2048)
    with pytest.raises(DataError, match=r"tokens and 1 new ones are wanted.*context holds 2048"):
        llama.ask("How many? " * 2000)
    assert llama.messages == ()


# ------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("text", "image", "reason"),
    [
        ("What?", "missing.png", r"image missing\.png cannot be read: No such file"),
        ("What?", b"", "the image: the image has zero bytes"),
        ("What?", b"no image at all", "the image: 15 bytes that are no image"),
        ("What?", bomb(), "decompression bomb"),
        ("What?", picture("red", "JPEG", size=(300, 200))[:-300], "image 1 of 1: the image is damaged"),
        (" ", None, "message 3 asks nothing"),
        ("\ud800", None, "surrogate"),
        ("Say </s> now", None, "control token </s>"),
        ("An <image> here", None, "<image>"),
    ],
)
def test_a_bad_question_is_one_sentence_and_leaves_the_history(
    llama: Chat, text: str, image: str | bytes | None, reason: str
) -> None:
    llama.ask("Hello.", max_new_tokens=2)
    before = llama.messages
    with pytest.raises(DataError, match=reason) as caught:
        llama.stream(text, [] if image is None else [image])
    assert "\n" not in str(caught.value)
    assert llama.messages == before


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Sampling(max_new_tokens=0), "max_new_tokens is 0"),
        (lambda: Sampling(temperature=-1.0), r"temperature is -1\.0"),
        (lambda: Sampling(temperature=float("nan")), "temperature is nan"),
        (lambda: Sampling(top_p=0.0), r"top_p is 0\.0"),
        (lambda: Sampling(stop=("",)), "empty stop string"),
    ],
)
def test_an_impossible_sampling_is_refused(make: Callable[[], Sampling], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        make()


# ------------------------------------------------------------------------------------------------- opening


def test_stage_model_checkpoint_and_hub_directories_answer_alike(
    llama_stage: Path, tmp_path: Path, llama: Chat
) -> None:
    asked = ("What colour?", [picture("blue")])
    expected = Chat(llama.loaded).ask(*asked, max_new_tokens=10)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000040"
    shutil.copytree(llama_stage / "model", checkpoint / "model")
    (checkpoint / "COMPLETE").touch()
    hub = tmp_path / "hub"
    shutil.copytree(llama_stage / "model", hub)
    (hub / "mmit.json").unlink()  # what is left is a LLaVA directory of transformers
    for directory in (llama_stage / "model", tmp_path / "run", hub):
        assert Chat.load(directory, device="cpu").ask(*asked, max_new_tokens=10) == expected


def test_a_directory_without_a_model_and_an_unknown_device_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no model directory"):
        Chat.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no model"):
        Chat.load(tmp_path)
    with pytest.raises(ConfigError, match="device 'abacus' cannot be used"):
        Chat.load(tmp_path, device="abacus")
