"""Tiny models made on the spot, with random weights from a fixed seed: directories as a hub would hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from factories import tiny_llama_tokenizer, tiny_qwen_tokenizer
from transformers import (
    AutoModel,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

IMAGE_SIZE = 28
PATCH_SIZE = 14
HIDDEN = 32
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

_SEED = 20240501


def randomize(model: PreTrainedModel) -> None:
    """Give every tensor weights from a fixed seed, large enough that logits depend visibly on tokens and images."""
    generator = torch.Generator().manual_seed(_SEED)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.data = noise * min(0.3, parameter.shape[-1] ** -0.5)
        else:
            center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.data = center + 0.1 * noise


def _save(model: PreTrainedModel, directory: Path) -> None:
    randomize(model)
    model.save_pretrained(directory)


def tiny_llm_dir(directory: Path | str, kind: Literal["llama", "qwen2"] = "llama", *, tied: bool | None = None) -> Path:
    """A causal LLM of 2 layers, hidden 32, with its tokenizer: llama (untied, no pad token) or qwen2 (tied, GQA)."""
    directory = Path(directory)
    common: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 2048,
    }
    if kind == "llama":
        tokenizer = tiny_llama_tokenizer(directory)
        config = LlamaConfig(
            **common,
            vocab_size=len(tokenizer),
            num_key_value_heads=4,
            rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=bool(tied),
        )
        model: PreTrainedModel = LlamaForCausalLM(config)
    else:
        tokenizer = tiny_qwen_tokenizer(directory)
        qwen = Qwen2Config(
            **common,
            vocab_size=len(tokenizer) + 5,  # more rows than tokens, as the real one has
            num_key_value_heads=2,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=tied is not False,
        )
        model = Qwen2ForCausalLM(qwen)
    _save(model, directory)
    return directory


def tiny_clip_dir(directory: Path | str, *, layers: int = 3) -> Path:
    """A CLIP vision tower of 3 layers for images of 28 pixels: 4 patches and a class token."""
    directory = Path(directory)
    config = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=16,
        hidden_act="quick_gelu",
    )
    _save(CLIPVisionModel(config), directory)
    CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    ).save_pretrained(directory)
    return directory


def tiny_siglip_dir(directory: Path | str) -> Path:
    """A SigLIP vision tower of 3 layers for images of 28 pixels: 4 patches, no class token."""
    directory = Path(directory)
    config = SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    _save(SiglipVisionModel(config), directory)
    SiglipImageProcessor(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(directory)
    return directory


def tiny_dino_dir(directory: Path | str, kind: Literal["dinov2", "dinov2_with_registers", "dinov3_vit"]) -> Path:
    """A DINOv2 or DINOv3 tower of 3 layers for images of 28 pixels: 4 patches, a class token, perhaps 2 registers."""
    directory = Path(directory)
    common: dict[str, Any] = {
        **{"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3},
        **{"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE},
    }
    configs = {
        "dinov2": lambda: Dinov2Config(**common, mlp_ratio=2, layerscale_value=0.7),
        "dinov2_with_registers": lambda: Dinov2WithRegistersConfig(**common, mlp_ratio=2, num_register_tokens=2),
        "dinov3_vit": lambda: DINOv3ViTConfig(**common, intermediate_size=48, num_register_tokens=2),
    }
    _save(AutoModel.from_config(configs[kind]()), directory)
    statistics = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    (directory / "preprocessor_config.json").write_text(json.dumps(statistics))
    return directory


def tiny_open_clip(directory: Path | str, *, quick_gelu: bool = True) -> dict[str, Any]:
    """An open_clip ViT of 3 layers for images of 28 pixels; returns the ``model.encoder`` section that reads it."""
    import open_clip

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    description = {
        "embed_dim": 16,
        "quick_gelu": quick_gelu,
        "vision_cfg": {
            "image_size": IMAGE_SIZE,
            "layers": 3,
            "width": 32,
            "head_width": 8,
            "mlp_ratio": 2.0,
            "patch_size": PATCH_SIZE,
        },
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
    }
    name = directory / "tiny-vit.json"
    name.write_text(json.dumps(description))
    weights = directory / "tiny-vit.pt"
    open_clip.add_model_config(str(name))
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        torch.save(open_clip.create_model("tiny-vit").state_dict(), weights)
    return {"type": "open_clip", "name": str(name), "pretrained": str(weights), "layer": -2}


def tiny_model_section(
    directory: Path | str, kind: Literal["clip_llama", "siglip_qwen2", "open_clip_llama"] = "clip_llama"
) -> dict[str, Any]:
    """The ``model`` section of a run file for tiny parts, which are written under ``directory``."""
    directory = Path(directory)
    llm: Literal["llama", "qwen2"] = "qwen2" if kind == "siglip_qwen2" else "llama"
    if kind == "clip_llama":
        encoder = {"type": "transformers", "path": str(tiny_clip_dir(directory / "clip"))}
    elif kind == "siglip_qwen2":
        path = str(tiny_siglip_dir(directory / "siglip"))
        encoder = {"type": "transformers", "path": path, "resize": "squash"}
    else:
        encoder = tiny_open_clip(directory / "open_clip")
    template = {"llama": "vicuna", "qwen2": "chatml"}[llm]
    return {
        "encoder": encoder,
        "connector": {"type": "mlp", "depth": 2},
        "language_model": {"path": str(tiny_llm_dir(directory / llm, llm)), "template": template},
    }
