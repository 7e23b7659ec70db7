"""What a Q-Former starts from: BERT, BLIP-2 and InstructBLIP of transformers, LAVIS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_factories import randomize
from torch import Tensor
from transformers import BertConfig, BertModel, InstructBlipQFormerConfig, InstructBlipQFormerModel

from mmit.errors import CheckpointError, ConfigError
from mmit.models.connectors.qformer import QFormer, Reading, Shape
from mmit.models.connectors.qformer_weights import start_from

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "cross_attention_frequency": 2,
}
WORDS, POSITIONS = 20, 12


def qformer(*, reads: bool = True, words: int = WORDS, width_in: int = 8) -> QFormer:
    reading = Reading(tokenizer="", length=8, vocabulary=words, positions=POSITIONS) if reads else None
    return QFormer(width_in=width_in, width_out=32, count=3, shape=Shape(**SIZES), reading=reading).eval()


def test_a_bert_gives_the_text_half_which_then_computes_what_bert_does(tmp_path: Path) -> None:
    names = {name: size for name, size in SIZES.items() if name != "cross_attention_frequency"}
    bert = BertModel(
        BertConfig(**names, vocab_size=WORDS - 1, max_position_embeddings=POSITIONS), add_pooling_layer=False
    )
    randomize(bert)
    bert.embeddings.token_type_embeddings.weight.data.zero_()  # a Q-Former has none
    bert.save_pretrained(tmp_path)
    connector = qformer()
    start_from(connector, str(tmp_path))
    ids = torch.tensor([[2, 7, 9, 3]])
    with torch.no_grad():
        ours = connector.qformer(input_ids=ids).last_hidden_state
        theirs = bert.eval()(input_ids=ids).last_hidden_state
    # the same operations; attention takes another kernel
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    state = connector.state_dict()
    twin = "qformer.encoder.layer.1.{}.dense.weight"
    assert torch.equal(state[twin.format("intermediate_query")], state[twin.format("intermediate")])
    assert torch.equal(state[twin.format("output_query")], state[twin.format("output")])


def lavis(reference: InstructBlipQFormerModel, queries: Tensor) -> dict[str, Tensor]:
    """The tensors under the names of LAVIS, of which each is written out here."""
    state, found = reference.state_dict(), {"query_tokens": queries, "ln_vision.weight": torch.ones(8)}
    for table in ("word_embeddings", "position_embeddings"):
        found[f"Qformer.bert.embeddings.{table}.weight"] = state[f"embeddings.{table}.weight"]
    found["Qformer.bert.embeddings.position_ids"] = torch.arange(POSITIONS)
    found["Qformer.cls.predictions.bias"] = torch.zeros(WORDS)
    dense = ("intermediate.dense", "intermediate_query.dense", "output.dense", "output_query.dense")
    for end in ("weight", "bias"):
        found[f"Qformer.bert.embeddings.LayerNorm.{end}"] = state[f"embeddings.layernorm.{end}"]
        for layer, kinds in (("layer.0", ("attention", "crossattention")), ("layer.1", ("attention",))):
            here, there = f"encoder.{layer}", f"Qformer.bert.encoder.{layer}"
            for kind in kinds:
                for part in ("query", "key", "value"):
                    found[f"{there}.{kind}.self.{part}.{end}"] = state[f"{here}.{kind}.attention.{part}.{end}"]
                for part in ("dense", "LayerNorm"):
                    found[f"{there}.{kind}.output.{part}.{end}"] = state[f"{here}.{kind}.output.{part}.{end}"]
            for part in (*dense, "output.LayerNorm", "output_query.LayerNorm"):
                found[f"{there}.{part}.{end}"] = state[f"{here}.{part}.{end}"]
    return found


@pytest.fixture
def reference() -> InstructBlipQFormerModel:
    tables = {"vocab_size": WORDS, "max_position_embeddings": POSITIONS}
    model = InstructBlipQFormerModel(InstructBlipQFormerConfig(**SIZES, **tables, encoder_hidden_size=8))
    randomize(model)
    return model.eval()


@pytest.mark.parametrize("reads", [True, False])
def test_a_file_of_lavis_gives_all_but_the_last_layer(
    reads: bool, reference: InstructBlipQFormerModel, tmp_path: Path
) -> None:
    queries = torch.randn((1, 3, 16), generator=torch.Generator().manual_seed(0))
    torch.save({"model": lavis(reference, queries), "epoch": 3}, tmp_path / "instruct_blip.pth")
    connector = qformer(reads=reads, words=WORDS + 1)
    start_from(connector, str(tmp_path / "instruct_blip.pth"))
    patches = torch.randn((1, 5, 8), generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[4, 9]]) if reads else None
    mask = None if ids is None else torch.ones_like(ids)
    with torch.no_grad():
        found = connector(patches, ids, mask)
        text: Any = {"input_ids": ids}
        expected = reference(**text, query_embeds=queries, encoder_hidden_states=patches).last_hidden_state[:, :3]
        expected = connector.language_projection(expected)
    # the same operations; attention takes another kernel where there is a mask of ones
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_blip_2_has_no_words_for_a_qformer_that_reads_them(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    blind = qformer(reads=False)
    save_file({**blind.state_dict(), "vision_model.x": torch.ones(1)}, tmp_path / "model.safetensors")
    again = qformer(reads=False)
    start_from(again, str(tmp_path))
    parts = [name for name, _ in blind.named_parameters() if not name.startswith("language_projection")]
    assert all(torch.equal(again.state_dict()[name], blind.state_dict()[name]) for name in parts)
    with pytest.raises(ConfigError, match=r"lacks 14 tensors of this Q-Former \(embeddings.position_embeddings"):
        start_from(qformer(), str(tmp_path))


def test_other_sizes_and_files_that_are_not_there_are_named(
    reference: InstructBlipQFormerModel, tmp_path: Path
) -> None:
    file = tmp_path / "instruct_blip.pth"
    torch.save({"model": lavis(reference, torch.zeros(1, 3, 16))}, file)
    with pytest.raises(
        ConfigError, match=r"crossattention.attention.key.weight is \(16, 8\), this Q-Former's is \(16, 9"
    ):
        start_from(qformer(width_in=9), str(file))
    with pytest.raises(ConfigError, match="there is no directory or file nowhere"):
        start_from(qformer(), "nowhere")
    file.write_bytes(b"no pickle")
    with pytest.raises(CheckpointError, match=r"instruct_blip.pth"):
        start_from(qformer(), str(file))
