"""The demo's language model: its tokenizer, the texts it learns from, and its training on text alone.

The texts are captions, and dialogues in which a caption stands where a picture will stand later. They are rendered by
the chat template and tokenized by the code that tune the model afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mmit.conversation import Conversation, Message
from mmit.demo.muon import Muon, set_lr
from mmit.demo.world import Question, Scene, World, ask, caption, make_scene, tags
from mmit.encoding import encode
from mmit.templates import ChatTemplate, built_in_source

TEMPLATE = "chatml"
_PAD, _START, _END = "<pad>", "<|im_start|>", "<|im_end|>"
_NO_IMAGE = -1
_CAPTION_SHARE = 0.3
"""Share of the texts that are a scene told in words and its caption; the others are dialogues about such words."""
_TAGS_SHARE = 0.5
"""How often a scene is told as loose words and not as a caption: patches of a picture have no order of a sentence."""


@dataclass(frozen=True, kw_only=True)
class LanguageSettings:
    """Sizes and budget. answer_weight: of a token of an answer in the loss, where all others count 1."""

    hidden: int = 128
    inner: int = 320
    layers: int = 3
    heads: int = 4
    vocabulary: int = 512
    texts_per_step: int = 32
    steps: int = 300
    turns: int = 9
    answer_weight: float = 8.0
    matrix_lr: float = 2e-2
    other_lr: float = 3e-3
    seed: int = 11


def make_tokenizer(world: World, settings: LanguageSettings, directory: Path) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer trained on the world's texts, written into ``directory`` with the chat template."""
    rng = np.random.default_rng(settings.seed)
    texts = ["user\n", "assistant\n"] * 200
    for _ in range(2000):
        scene = make_scene(world, rng, pairs="all")
        questions = _questions(scene, world, rng)
        texts += [caption(scene, rng), *(q.text for q in questions), *(q.answer for q in questions)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=[_PAD, _START, _END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=_PAD, eos_token=_END, additional_special_tokens=[_START]
    )
    whole.chat_template = built_in_source(TEMPLATE)
    whole.save_pretrained(directory)
    return whole


def train_language_model(
    world: World,
    tokenizer: PreTrainedTokenizerBase,
    settings: LanguageSettings,
    directory: Path,
    *,
    on_step: Callable[[int, float], None],
) -> None:
    """Train a Llama on the world's texts and write it into ``directory``; ``on_step`` gets a step's number and loss."""
    assert tokenizer.pad_token_id is not None, "made by make_tokenizer"
    torch.manual_seed(settings.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.hidden,
            intermediate_size=settings.inner,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            max_position_embeddings=1024,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [
        Muon(matrices, lr=settings.matrix_lr),
        torch.optim.AdamW(others, lr=settings.other_lr, weight_decay=0.0),
    ]
    texts = _texts(world, tokenizer, settings)
    model.train()
    for step in range(1, settings.steps + 1):
        ids, weights = _batch([next(texts) for _ in range(settings.texts_per_step)], tokenizer.pad_token_id)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]  # (B, T - 1, V)
        nll = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        wanted = weights[:, 1:].flatten()
        loss = (nll * wanted).sum() / wanted.sum()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        set_lr(optimizers, step / settings.steps)
        for optimizer in optimizers:
            optimizer.step()
        on_step(step, loss.item())
    model.save_pretrained(directory)


def told_question(scene: Scene, question: Question, rng: np.random.Generator) -> Message:
    """The user's turn that tells the scene in words, where a picture would stand, and asks."""
    return Message(role="user", content=(f"{_told(scene, rng)}\n{question.text}",))


def _told(scene: Scene, rng: np.random.Generator) -> str:
    return tags(scene, rng) if rng.random() < _TAGS_SHARE else caption(scene, rng)


def _questions(scene: Scene, world: World, rng: np.random.Generator) -> list[Question]:
    return [ask(scene, kind, rng) for kind in world.question_types if scene.admits(kind)]


def _texts(
    world: World, tokenizer: PreTrainedTokenizerBase, settings: LanguageSettings
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (ids, weights), each (T,)."""
    rng = np.random.default_rng(settings.seed)
    template = ChatTemplate.load(TEMPLATE, tokenizer)
    while True:
        scene = make_scene(world, rng, pairs="all")
        if rng.random() < _CAPTION_SHARE:
            # side by side, as a picture and its caption stand in the template "plain"
            told = tokenizer.encode(_told(scene, rng))
            ids = torch.tensor([*told, *tokenizer.encode(f"{caption(scene, rng)}\n")])
            yield ids, torch.ones(len(ids))
            continue
        questions = _questions(scene, world, rng)
        order = rng.permutation(len(questions))[: settings.turns]
        messages: list[Message] = []
        for number in order:
            question = questions[number]
            told = Message(role="user", content=(question.text,)) if messages else told_question(scene, question, rng)
            messages += [told, Message(role="assistant", content=(question.answer,))]
        rendered = template.render(Conversation(id="text", messages=tuple(messages)))
        ids, is_answer = encode(rendered, tokenizer, [], image_id=_NO_IMAGE)
        yield ids, 1.0 + (settings.answer_weight - 1.0) * is_answer.float()


def _batch(texts: list[tuple[Tensor, Tensor]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids (B, T) and weights (B, T), 0 on padding."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([ids for ids, _ in texts], batch_first=True, padding_value=pad_id)
    return ids, pad([weights for _, weights in texts], batch_first=True)
