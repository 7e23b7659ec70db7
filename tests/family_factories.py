"""Toy models of many families of causal language models, each with a tokenizer and a chat template that fit it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from factories import tiny_llama_tokenizer, tiny_qwen_tokenizer
from model_factories import tiny_clip_dir
from transformers import AutoConfig, AutoModelForCausalLM

from mmit.config import ComposedModel

LLAMA3_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
PHI3_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
GEMMA_TOKENS = ("<start_of_turn>", "<end_of_turn>")
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
TOKENS = {"llama3": LLAMA3_TOKENS, "phi3": PHI3_TOKENS, "gemma": GEMMA_TOKENS, "chatml": CHATML_TOKENS}

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2}
WINDOW = 4
"""Tokens that a layer with a sliding window looks back on; the samples of the tests are longer."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """model_type and fields of the configuration; ``attention`` and ``layout`` are what is expected of mmit."""

    kind: str
    fields: dict[str, Any] = field(default_factory=lambda: SIZES)
    words: Literal["llama", "qwen"] = "llama"
    template: str = "vicuna"
    attention: str = "mmit_packed"
    layout: Literal["llava", "own"] = "llava"
    packs: bool = True


FAMILIES: dict[str, Family] = {
    "llama": Family(kind="llama", fields=SIZES | GROUPED, template="llama3"),
    "smollm": Family(kind="llama", fields=SIZES | GROUPED | {"tie_word_embeddings": True}, template="chatml"),
    "qwen2": Family(
        kind="qwen2",
        fields=SIZES | {"num_key_value_heads": 2, "tie_word_embeddings": True},
        words="qwen",
        template="qwen",
    ),
    "qwen3": Family(kind="qwen3", fields=SIZES | GROUPED, words="qwen", template="qwen"),
    "mistral": Family(kind="mistral", fields=SIZES | GROUPED | {"sliding_window": WINDOW}, template="mistral"),
    "phi": Family(kind="phi", words="qwen", layout="own"),  # its head has a bias
    "phi3": Family(kind="phi3", fields=SIZES | {"num_key_value_heads": 2, "pad_token_id": 0}, template="phi3"),
    "gemma2": Family(
        kind="gemma2",
        fields=SIZES | GROUPED | {"sliding_window": WINDOW, "attn_logit_softcapping": 5.0},
        template="gemma",
        attention="eager",  # soft-capped scores
        layout="own",  # soft-capped logits
    ),
    "gemma3": Family(
        kind="gemma3_text",
        fields=SIZES | GROUPED | {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
        template="gemma",
    ),
    "olmo2": Family(kind="olmo2", words="qwen"),
    "stablelm": Family(kind="stablelm", fields=SIZES | {"num_key_value_heads": 2}, words="qwen", attention="sdpa"),
    "smollm3": Family(
        kind="smollm3",
        fields=SIZES | {"num_key_value_heads": 2, "no_rope_layers": [1, 0], "pad_token_id": 0},
        template="chatml",
    ),
    "mixtral": Family(kind="mixtral", fields=SIZES | GROUPED | EXPERTS | {"num_local_experts": 4}, template="mistral"),
    "qwen3_moe": Family(
        kind="qwen3_moe",
        fields=SIZES | GROUPED | EXPERTS | {"num_experts": 4, "moe_intermediate_size": 16},
        words="qwen",
        template="qwen",
    ),
    "gpt_neox": Family(kind="gpt_neox", words="qwen", layout="own"),  # tensors are not named model.* and lm_head.*
    # what cannot keep packed samples apart trains with one sample per row
    "bloom": Family(
        kind="bloom",
        fields={"hidden_size": 32, "n_layer": 2, "n_head": 4},
        words="qwen",
        attention="eager",
        layout="own",
        packs=False,
    ),
    "falcon": Family(kind="falcon", fields=SIZES, words="qwen", attention="sdpa", layout="own", packs=False),
    "gpt_oss": Family(
        kind="gpt_oss",
        fields=SIZES | GROUPED | EXPERTS | {"num_local_experts": 4, "sliding_window": WINDOW},
        words="qwen",
        attention="eager",
        packs=False,
    ),
    "mamba": Family(
        kind="mamba",
        fields={"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
        words="qwen",
        attention="eager",
        layout="own",
        packs=False,
    ),
}


def family_section(name: str, directory: Path) -> ComposedModel:
    """The ``model`` section of a family whose parts are written below ``directory``."""
    return ComposedModel.model_validate(
        {
            "encoder": {"type": "transformers", "path": str(directory / "clip")},
            "language_model": {"path": str(directory / name), "template": FAMILIES[name].template},
        }
    )


def write_family(name: str, directory: Path) -> None:
    """Write the parts of a family, with weights of a fixed seed."""
    family = FAMILIES[name]
    if not (directory / "clip").is_dir():
        tiny_clip_dir(directory / "clip")
    folder = directory / name
    tokenizer = (tiny_llama_tokenizer if family.words == "llama" else tiny_qwen_tokenizer)(folder)
    tokenizer.add_tokens(list(TOKENS.get(family.template, ())), special_tokens=True)
    tokenizer.save_pretrained(folder)
    config: Any = AutoConfig.for_model(
        family.kind,
        **family.fields,
        vocab_size=640,  # more rows than tokens, so that none is added
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        maker: Any = AutoModelForCausalLM
        maker.from_config(config, dtype=torch.float32).save_pretrained(folder)
