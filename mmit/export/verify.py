"""The proof of an export: what was written, opened by its own class, against what the model said before.

Both sides compute in fp32, so that only the order of sums differs. Ids and pixels are the probe's, made by mmit; that
the written processor makes the same of the picture is a question of its own.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoProcessor

from mmit.errors import CheckpointError
from mmit.export.probes import ANSWER_TOKENS, Probe, probe
from mmit.images import ImageSpec, normalize, read_size
from mmit.models.load import load_model
from mmit.models.loaded import LoadedModel
from mmit.tokenizer import IMAGE_TEXT

TOLERANCE = 1e-3
"""Largest difference of logits, as a share of the largest logit: fp32 sums of some ten thousand terms."""

Inputs = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What must be known of a model to ask another reader, once the model itself is out of memory."""

    spec: ImageSpec
    image_id: int
    pad_id: int
    never: tuple[int, ...]

    @classmethod
    def of(cls, loaded: LoadedModel) -> Facts:
        """The facts of a model."""
        return cls(spec=loaded.spec, image_id=loaded.image_id, pad_id=loaded.pad_id, never=loaded.model.never())


@dataclass(frozen=True)
class Proof:
    """What was compared: by which reader, and the largest difference of logits."""

    reader: str
    difference: float
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        told = f"opened again by {self.reader}: logits differ by at most {self.difference:.1e}"
        return "; ".join((told, "greedy answers are the same", *self.notes))


def prove_by_transformers(directory: Path, class_name: str, probes: Sequence[Probe], facts: Facts) -> Proof:
    """Open ``directory`` with a class of transformers. Raises CheckpointError where anything differs."""
    reader: Any = getattr(transformers, class_name)
    theirs, report = reader.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    _check_report(directory, class_name, report)
    make_inputs = _INPUTS[class_name]
    if class_name in _NEEDS_PICTURE:
        probes = [one for one in probes if one.picture is not None]
    inputs = [make_inputs(one, facts.spec) for one in probes]
    difference = _compare(directory, theirs.eval(), probes, inputs, facts)
    text = "What?" if class_name in _NEEDS_PICTURE else IMAGE_TEXT
    return Proof(class_name, difference, _processor_notes(directory, probes, facts, text=text))


def prove_language_model(directory: Path, probes: Sequence[Probe], facts: Facts) -> Proof:
    """Open ``directory`` as a causal language model of transformers. Raises CheckpointError."""
    reader: Any = AutoModelForCausalLM
    theirs, report = reader.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    _check_report(directory, "AutoModelForCausalLM", report)
    inputs = [_text_inputs(one, facts.spec) for one in probes]
    return Proof(type(theirs).__name__, _compare(directory, theirs.eval(), probes, inputs, facts))


def prove_by_mmit(directory: Path, probes: Sequence[Probe], loaded: LoadedModel, *, stored: torch.dtype) -> Proof:
    """Open ``directory`` with mmit: all weights the same to the bit, and the same logits. Raises CheckpointError."""
    again = load_model(directory, dtype=stored)
    mine, other = loaded.model.state_dict(), again.model.state_dict()
    if mine.keys() == other.keys():
        changed = [name for name in mine if not torch.equal(mine[name].to(stored), other[name])]
    else:
        changed = []  # an encoder of open_clip or timm comes back as its twin of transformers
    if changed:
        raise CheckpointError(f"{directory}: {len(changed)} tensors came back changed ({', '.join(changed[:3])})")
    again.model.float()
    found = probe(again)
    for one, two in zip(probes, found, strict=True):
        if one.answer != two.answer:
            raise _another_answer(directory, one, two.answer)
    difference = max(_difference(directory, one, two.logits) for one, two in zip(probes, found, strict=True))
    return Proof("mmit", difference)


def _compare(
    directory: Path,
    theirs: Any,  # noqa: ANN401 - a class of transformers, known at run time
    probes: Sequence[Probe],
    inputs: Sequence[Inputs],
    facts: Facts,
) -> float:
    worst = 0.0
    for one, given in zip(probes, inputs, strict=True):
        with torch.no_grad():
            logits = theirs(**given).logits[0]
            worst = max(worst, _difference(directory, one, logits))
            made = theirs.generate(
                **given,
                attention_mask=torch.ones_like(given["input_ids"]),
                max_new_tokens=ANSWER_TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=facts.pad_id,
                suppress_tokens=list(facts.never) or None,
            )
        answer = made[0, given["input_ids"].shape[1] :].tolist()
        if answer != one.answer:
            raise _another_answer(directory, one, answer)
    return worst


def _difference(directory: Path, one: Probe, logits: Tensor) -> float:
    """The largest difference; raises CheckpointError beyond the tolerance."""
    if logits.shape != one.logits.shape:
        raise CheckpointError(
            f"{directory}: logits of the {one.name} probe have the shape {tuple(logits.shape)}, not "
            f"{tuple(one.logits.shape)}"
        )
    difference = float((logits - one.logits).abs().max())
    allowed = TOLERANCE * max(1.0, float(one.logits.abs().max()))
    if not difference <= allowed:
        raise CheckpointError(
            f"{directory} does not hold the same model: logits of the {one.name} probe differ by {difference:.2g}, "
            f"allowed are {allowed:.2g}"
        )
    return difference


def _another_answer(directory: Path, one: Probe, answer: list[int]) -> CheckpointError:
    return CheckpointError(
        f"{directory} answers the {one.name} probe with the ids {answer}, the model with {one.answer}: it is not the "
        "same model"
    )


def _check_report(directory: Path, reader: str, report: dict[str, Any]) -> None:
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, report.get(kind) or ())):
            raise CheckpointError(
                f"{directory} opened by {reader} has {len(names)} {kind.replace('_', ' ')}: {', '.join(names[:3])}"
            )


def _processor_notes(directory: Path, probes: Sequence[Probe], facts: Facts, *, text: str) -> tuple[str, ...]:
    """What the written processor makes of the picture, against mmit. Raises CheckpointError where it cannot serve."""
    shown = next(one for one in probes if one.picture is not None)
    assert shown.picture is not None
    processor = AutoProcessor.from_pretrained(directory)
    made = processor(images=Image.open(io.BytesIO(shown.picture)), text=text, return_tensors="pt")
    tokens = int((made["input_ids"] == facts.image_id).sum())
    expected = sum(plan.tokens for plan in shown.prompt.plans)
    if tokens != expected:
        raise CheckpointError(f"{directory}: the processor writes {tokens} image tokens for a picture, not {expected}")
    pixels = normalize(shown.prompt.pixels, facts.spec)
    theirs = made["pixel_values"].reshape(-1, *pixels.shape[1:])[: len(pixels)]
    grey = float((theirs - pixels).abs().max()) * min(facts.spec.std) * 255
    return (f"its processor's pixels differ by at most {grey:.0f} of 255",)


def _text_inputs(one: Probe, _: ImageSpec) -> Inputs:
    return {"input_ids": one.prompt.input_ids[None]}


def _one_tile_inputs(one: Probe, spec: ImageSpec) -> Inputs:
    inputs = _text_inputs(one, spec)
    if len(one.prompt.pixels):
        inputs["pixel_values"] = normalize(one.prompt.pixels, spec)
    return inputs


def _tiled_inputs(one: Probe, spec: ImageSpec) -> Inputs:
    inputs = _text_inputs(one, spec)
    if one.picture is not None:
        width, height = read_size(one.picture)
        inputs["pixel_values"] = normalize(one.prompt.pixels, spec)[None]
        inputs["image_sizes"] = torch.tensor([[height, width]])
    return inputs


def _question_inputs(one: Probe, spec: ImageSpec) -> Inputs:
    inputs, asked = _one_tile_inputs(one, spec), one.prompt.instructions
    if asked is not None and len(asked.ids):
        inputs |= {"qformer_input_ids": asked.ids, "qformer_attention_mask": asked.mask}
    return inputs


_INPUTS: dict[str, Callable[[Probe, ImageSpec], Inputs]] = {
    "LlavaForConditionalGeneration": _one_tile_inputs,
    "LlavaNextForConditionalGeneration": _tiled_inputs,
    "LlavaOnevisionForConditionalGeneration": _tiled_inputs,
    "InstructBlipForConditionalGeneration": _question_inputs,
}
"""What each class of transformers is fed."""

_NEEDS_PICTURE = ("InstructBlipForConditionalGeneration",)
"""Classes that take no text without a picture; their processor puts the image tokens in by itself."""
