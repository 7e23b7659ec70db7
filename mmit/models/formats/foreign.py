"""Directories that are known and cannot be opened as a model: parts alone, and layouts of other projects."""

from __future__ import annotations

from mmit.models.formats.contents import Contents, Json

_TOWERS = (
    *("clip", "clip_vision_model", "siglip", "siglip_vision_model", "siglip2", "siglip2_vision_model"),
    *("dinov2", "dinov2_with_registers", "dinov3_vit"),
)


def foreign(config: Json) -> tuple[str, str] | None:
    """What a ``config.json`` describes that is no model for mmit to open, and why or what to do; None for others."""
    kind = config.get("model_type")
    if kind == "tinyllava":
        return (
            "a TinyLLaVA model",
            "which cannot be read: its features leave out the first patch of SigLIP as if it were a class token, and "
            "its prompts depend on the language model's name",
        )
    run = config.get("model")
    if isinstance(run, dict) and "arch_specifier" in run:
        return (
            "a run of prismatic-vlms",
            f"which cannot be read: its checkpoints leave out the vision tower ({run.get('vision_backbone_id')}) and "
            "name the language model by an id of that code; its HF conversion is no class of transformers either",
        )
    if kind in _TOWERS:
        return "a vision tower alone", "name it as model.encoder.path in a run file, with a language model"
    if any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in config.get("architectures") or ()):
        return "a language model alone", "name it as model.language_model.path in a run file, with an encoder"
    return None


def refusal(contents: Contents) -> str | None:
    """The sentence with which such a directory is refused, or None."""
    found = foreign(contents.config)
    return None if found is None else f"{contents.directory} holds {found[0]}: {found[1]}"
