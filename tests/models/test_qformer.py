"""Q-Formers: numbers of transformers' BLIP-2 and InstructBLIP, and the way of a question through a whole model."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from data_factories import picture
from factories import tiny_bert_tokenizer
from models_support import batch_of, gradients
from msgspec import structs
from torch import Tensor
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    LlamaConfig,
)

from mmit.batch import Encoded
from mmit.config import ComposedModel, Data, QFormerConnector, WholeModel
from mmit.conversation import Conversation, ImageRef, Message
from mmit.encoding import encode_conversation
from mmit.errors import ConfigError, DataError
from mmit.models import LoadedModel, build_model, load_model, read_outline, save_model
from mmit.models.connectors.qformer import QFormer, Reading, Shape
from mmit.models.prompts import encode_prompt
from mmit.train.feed import make_encode

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "cross_attention_frequency": 2,
}
TOWER: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TOWER |= {"image_size": 28, "patch_size": 14}
TEXT = LlamaConfig(vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
PIXELS = torch.randn((2, 3, 28, 28), generator=torch.Generator().manual_seed(0))


def randomized(model: torch.nn.Module) -> Any:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def take(connector: QFormer, reference: Any) -> None:
    parts = ("query_tokens", "qformer.", "language_projection.")
    state = {name: tensor for name, tensor in reference.state_dict().items() if name.startswith(parts)}
    connector.load_state_dict(state)


@torch.no_grad()
def test_the_text_blind_one_is_blip_2s() -> None:
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**TOWER).to_dict(),
        qformer_config=Blip2QFormerConfig(**SIZES, encoder_hidden_size=24, use_qformer_text_input=False).to_dict(),
        text_config=TEXT.to_dict(),
        num_query_tokens=5,
    )
    reference = randomized(Blip2ForConditionalGeneration(config))
    connector = QFormer(width_in=24, width_out=32, count=5, shape=Shape(**SIZES)).eval()
    take(connector, reference)
    found = reference.get_image_features(PIXELS)
    # the same modules; without a mask of ones attention takes another kernel
    torch.testing.assert_close(connector(found.last_hidden_state), found.pooler_output, rtol=0, atol=2e-6)


@torch.no_grad()
def test_the_one_that_reads_the_question_is_instructblips() -> None:
    tables = {"vocab_size": 30, "max_position_embeddings": 12}
    config = InstructBlipConfig(
        vision_config=InstructBlipVisionConfig(**TOWER).to_dict(),
        qformer_config=InstructBlipQFormerConfig(**SIZES, **tables, encoder_hidden_size=24).to_dict(),
        text_config=TEXT.to_dict(),
        num_query_tokens=5,
        image_token_index=39,
    )
    reference = randomized(InstructBlipForConditionalGeneration(config))
    reading = Reading(tokenizer="", length=12, vocabulary=30, positions=12)
    connector = QFormer(width_in=24, width_out=32, count=5, shape=Shape(**SIZES), reading=reading).eval()
    take(connector, reference)
    ids, mask = torch.tensor([[2, 7, 9, 3], [2, 8, 3, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    found = reference.get_image_features(PIXELS, ids, mask)
    ours = connector(found.last_hidden_state, ids, mask)
    torch.testing.assert_close(ours, found.pooler_output, rtol=0, atol=2e-6)  # as above


@pytest.fixture(scope="module")
def section(tmp_path_factory: pytest.TempPathFactory, sections: dict[str, ComposedModel]) -> ComposedModel:
    """The tiny CLIP and Llama with a Q-Former that reads the question."""
    folder = tmp_path_factory.mktemp("bert")
    tiny_bert_tokenizer(folder)
    connector = {
        "type": "qformer",
        **{"tokens": 3, "hidden": 16, "depth": 2, "heads": 2, "intermediate": 32},
        "instruction": {"tokenizer": str(folder), "length": 16, "positions": 20},
    }
    content = sections["clip_llama"].model_dump() | {"connector": connector}
    return ComposedModel.model_validate(content)


@pytest.fixture
def asking(section: ComposedModel) -> LoadedModel:
    return build_model(section, dtype=torch.float32, seed=3)


def talk(question: str, picture: bytes | None, *, answer: str | None = "red") -> Conversation:
    parts = (question,) if picture is None else (ImageRef(0), question)
    turns = [Message(role="user", content=parts)]
    turns += [Message(role="assistant", content=(answer,))] if answer else []
    return Conversation(id="talk", messages=tuple(turns), images=() if picture is None else (picture,))


def encoded(loaded: LoadedModel, conversation: Conversation) -> Encoded:
    return encode_conversation(
        conversation,
        template=loaded.template,
        tokenizer=loaded.tokenizer,
        spec=loaded.spec,
        image_id=loaded.image_id,
        style=loaded.style,
        instructions=loaded.instructions,
    )


@torch.no_grad()
def losses(loaded: LoadedModel, rows: list[list[Encoded]]) -> float:
    return float(loaded.model(batch_of(loaded, rows)))


def image_tokens(loaded: LoadedModel, sample: Encoded) -> Tensor:
    with torch.no_grad():
        embeddings = loaded.model.embed(batch_of(loaded, [[sample]]))[0]
    return embeddings[sample.input_ids == loaded.image_id]


def test_another_question_gives_the_same_picture_other_tokens(asking: LoadedModel, red_square: bytes) -> None:
    one, two = (encoded(asking, talk(text, red_square)) for text in ("what colour is the square?", "how many?"))
    assert one.instructions is not None
    assert one.instructions.ids.shape[0] == one.pixels.shape[0] == 1
    assert not torch.allclose(image_tokens(asking, one), image_tokens(asking, two), atol=1e-4)


def test_samples_packed_in_one_row_keep_their_questions_apart(asking: LoadedModel, red_square: bytes) -> None:
    samples = [
        encoded(asking, talk("what colour is the square?", red_square)),
        encoded(asking, talk("how many?", None)),
        encoded(asking, talk("is the circle blue?", red_square, answer="yes, it is")),
    ]
    apart = sum(losses(asking, [[sample]]) for sample in samples)
    # sums of about 30 losses of size 6
    assert losses(asking, [samples]) == pytest.approx(apart, abs=1e-4)
    assert losses(asking, [samples[2:], samples[:2]]) == pytest.approx(apart, abs=1e-4)


def test_a_batch_without_the_questions_is_refused(asking: LoadedModel, red_square: bytes) -> None:
    sample = replace(encoded(asking, talk("how many?", red_square)), instructions=None)
    with pytest.raises(DataError, match="1 tiles but 0 instructions, which the connector reads"):
        asking.model(batch_of(asking, [[sample]]))


def test_a_prompt_asks_as_its_training_sample_does(asking: LoadedModel, red_square: bytes) -> None:
    trained = encoded(asking, talk("what colour is it?", red_square))
    prompt = encode_prompt(asking, talk("what colour is it?", red_square, answer=None))
    assert trained.input_ids[: prompt.length].equal(prompt.input_ids)
    assert torch.equal(image_tokens(asking, prompt), image_tokens(asking, trained))


def test_every_trained_parameter_gets_a_gradient_with_and_without_pictures(
    asking: LoadedModel, red_square: bytes
) -> None:
    model = asking.model
    (group,) = model.train_only({"connector": 1e-3})
    idle = ["multi_modal_projector.qformer.encoder.layer.1." + end for end in ("intermediate.", "output.")]
    assert not any(name.startswith(tuple(idle)) for name in group.names)
    assert any("layer.0.intermediate." in name for name in group.names)
    for conversation in (talk("how many?", red_square), talk("how many?", None)):
        model(batch_of(asking, [[encoded(asking, conversation)]])).backward()
        assert gradients(model).keys() == set(group.names)


def test_dropout_is_off_unless_asked_for_and_while_the_connector_is_frozen(
    section: ComposedModel, asking: LoadedModel, red_square: bytes
) -> None:
    wet = section.connector.model_copy(update={"dropout": 0.5})
    dropping = build_model(section.model_copy(update={"connector": wet}), dtype=torch.float32, seed=3)
    rows = [[encoded(asking, talk("how many?", red_square))]]
    for loaded, rules, same in (
        (asking, {"connector": 1.0}, True),
        (dropping, {"language_model": 1.0}, True),
        (dropping, {"connector": 1.0}, False),
    ):
        loaded.model.train_only(rules)
        loaded.model.train()
        assert (losses(loaded, rows) == losses(loaded, rows)) is same


def test_a_directory_brings_the_tokenizer_of_the_questions_along(
    asking: LoadedModel, red_square: bytes, tmp_path: Path
) -> None:
    sample = encoded(asking, talk("what colour is the square?", red_square))
    save_model(asking, None, tmp_path / "model", made_from={})
    moved = (tmp_path / "model").rename(tmp_path / "moved")
    kept = json.loads((moved / "mmit.json").read_text())["connector"]
    assert kept["instruction"]["tokenizer"] == "qformer_tokenizer"
    again = load_model(moved, dtype=torch.float32)
    state = again.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in asking.model.state_dict().items())
    same = encoded(again, talk("what colour is the square?", red_square))
    assert same.instructions is not None
    assert sample.instructions is not None
    assert torch.equal(same.instructions.ids, sample.instructions.ids)
    assert losses(again, [[same]]) == losses(asking, [[sample]])
    outline = read_outline(WholeModel(path=str(moved)))
    assert outline.instructions is not None
    assert outline.instructions.length == 16


def test_a_stage_encodes_its_samples_with_their_questions(asking: LoadedModel, red_square: bytes) -> None:
    encode = pickle.loads(pickle.dumps(make_encode(Data.model_validate({"mix": [{"shards": "s"}]}), asking)))
    conversation = talk("what colour is the square?", red_square)
    sample, alone = encode(conversation), encoded(asking, conversation)
    assert encode.measure(structs.replace(conversation, images=(), sizes=((28, 28),)))[0] == sample.length
    assert sample.instructions is not None
    assert alone.instructions is not None
    assert torch.equal(sample.instructions.ids, alone.instructions.ids)


def test_cached_features_are_read_with_the_question_too(asking: LoadedModel, red_square: bytes) -> None:
    batch = batch_of(asking, [[encoded(asking, talk("what colour is the square?", red_square))]])
    with torch.no_grad():
        features = asking.model.patches(batch.pixels)
        cached = replace(batch, pixels=batch.pixels[:0], features=features)
        assert torch.equal(asking.model(cached), asking.model(batch))


def test_a_tokenizer_with_more_tokens_than_the_table_has_rows_is_refused(section: ComposedModel) -> None:
    assert isinstance(section.connector, QFormerConnector)
    assert section.connector.instruction is not None
    few = section.connector.instruction.model_copy(update={"vocabulary": 10})
    connector = section.connector.model_copy(update={"instruction": few})
    with pytest.raises(ConfigError, match="has 55 tokens, the Q-Former's table 10 rows; they do not belong together"):
        build_model(section.model_copy(update={"connector": connector}), dtype=torch.float32, seed=3)


def test_two_steps_of_training_lower_the_loss(asking: LoadedModel, red_square: bytes) -> None:
    model = asking.model
    model.train_only({"connector": 1e-3})
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch = batch_of(asking, [[encoded(asking, talk("what colour is the square?", red_square))]])
    seen = []
    for _ in range(3):
        loss = model(batch)
        seen.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert seen[2] < seen[1] < seen[0]


@pytest.fixture(scope="module")
def red_square() -> bytes:
    return picture(28, 28)
