"""The matrix of docs/matrix.md: encoder x connector x language model x format, each cell really run at toy size.

A cell composes the model, takes the loss of a sample with a picture and its gradient, writes the model directory, and
exports it to transformers and to LLaVA's original layout with the proofs of ``mmit export``: opened again by the class
of the format, with the same logits and the same greedy answer. Run it with

    .venv/bin/python benchmarks/matrix.py            # writes docs/matrix.md; --limit N tries the first N cells only
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # the toy parts are those of the tests

LANGUAGE_MODELS = (
    *("llama", "qwen2", "qwen3", "mistral", "phi", "phi3", "gemma2", "gemma3", "olmo2", "stablelm", "smollm3"),
    *("mixtral", "gpt_neox"),
)
CONNECTORS: dict[str, dict[str, Any]] = {
    "linear": {"type": "linear"},
    "mlp": {"type": "mlp"},
    "pixel_shuffle": {"type": "pixel_shuffle"},
    "average_pool": {"type": "average_pool", "tokens": 1},
    "c_abstractor": {"type": "c_abstractor", "tokens": 4, "hidden": 8, "blocks": 1},
    "perceiver_resampler": {"type": "perceiver_resampler", "tokens": 3, "depth": 1, "heads": 2, "head_width": 4},
    "qformer": {"type": "qformer", "tokens": 3, "hidden": 16, "depth": 2, "heads": 2, "intermediate": 32},
}
ENCODERS = (
    *("CLIP", "SigLIP", "DINOv2", "DINOv2 with registers", "DINOv3", "open_clip ViT", "timm SigLIP", "timm ViT"),
    *("CLIP + DINOv2", "CLIP, layers -2 and -3"),
)


@dataclass(frozen=True)
class Cell:
    """What came of one combination: the class of transformers or "own", and whether LLaVA's layout holds it."""

    encoder: str
    connector: str
    language_model: str
    held_by: str
    original: bool
    failure: str = ""


def encoder_sections(folder: Path) -> dict[str, Any]:
    """Toy encoders written below ``folder``, as sections of a run file."""
    import timm
    from model_factories import tiny_clip_dir, tiny_dino_dir, tiny_open_clip, tiny_siglip_dir
    from tiny_timm import weights_of

    def of_timm(name: str) -> dict[str, Any]:
        weights_of(timm.create_model(name), folder / f"{name}.pt")
        return {"type": "timm", "name": name, "pretrained": str(folder / f"{name}.pt")}

    def read(path: Path, **keys: Any) -> dict[str, Any]:
        return {"type": "transformers", "path": str(path), **keys}

    clip, dino = read(tiny_clip_dir(folder / "clip")), read(tiny_dino_dir(folder / "dinov2", "dinov2"))
    registers = read(tiny_dino_dir(folder / "registers", "dinov2_with_registers"))
    made = (
        clip,
        read(tiny_siglip_dir(folder / "siglip"), resize="squash"),
        dino,
        registers,
        read(tiny_dino_dir(folder / "dinov3", "dinov3_vit")),
        tiny_open_clip(folder / "open_clip"),
        of_timm("tiny_siglip"),
        of_timm("tiny_plain"),
        [clip, dino],
        {**clip, "layer": [-2, -3]},
    )
    return dict(zip(ENCODERS, made, strict=True))


def run_cell(task: tuple[str, str, str, dict[str, Any], Path]) -> Cell:
    """One combination, from its parts to its exports."""
    encoder, connector, language_model, content, parts = task
    import torch

    from mmit.config import ComposedModel, WholeModel
    from mmit.errors import MmitError
    from mmit.export.export import export
    from mmit.models import build_model, save_model
    from mmit.models.formats.original import ORIGINAL

    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="cell-", dir=parts))
    try:
        loaded = build_model(ComposedModel.model_validate(content), dtype=torch.float32, seed=0)
        check_gradient(loaded)
        save_model(loaded, None, folder / "model", made_from={})
        assert ORIGINAL.write is not None
        original = ORIGINAL.write.why_not(loaded.model) is None
        del loaded
        told = export(WholeModel(path=str(folder / "model")), folder / "hf", to="hf")[0]
        held_by = told.split(": ", 1)[1].split(" of transformers")[0] if " of transformers" in told else "own"
        if original:
            export(WholeModel(path=str(folder / "model")), folder / "llava", to="llava")
    except MmitError as error:
        return Cell(encoder, connector, language_model, "", False, str(error))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Cell(encoder, connector, language_model, held_by, original)


def check_gradient(loaded: Any) -> None:
    """One sample with a picture: the loss is a number, and every weight of the connector gets a gradient."""
    import torch

    from mmit.batch import collate
    from mmit.conversation import Conversation, ImageRef, Message
    from mmit.encoding import encode_conversation
    from mmit.errors import TrainingError
    from mmit.export.probes import picture

    messages = (
        Message(role="user", content=(ImageRef(0), "What is it?")),
        Message(role="assistant", content=("a red bus",)),
    )
    sample = Conversation(id="toy", messages=messages, images=(picture(),))
    encoded = encode_conversation(
        sample,
        template=loaded.template,
        tokenizer=loaded.tokenizer,
        spec=loaded.spec,
        image_id=loaded.image_id,
        style=loaded.style,
        instructions=loaded.instructions,
    )
    batch = collate([[encoded]], pad_id=loaded.pad_id, image_size=loaded.spec.canvas)
    loaded.model.train_only({"connector": 1e-3})
    loss = loaded.model(batch)
    loss.backward()
    connector = loaded.model.multi_modal_projector
    without = [name for name, p in connector.named_parameters() if p.grad is None or not bool(p.grad.any())]
    if not bool(torch.isfinite(loss)) or without:
        raise TrainingError(f"loss {float(loss)}, no gradient at {without[:3]}")


def page(cells: list[Cell], *, seconds: float) -> str:
    """The matrix as markdown: a table for each encoder, rows are connectors, columns language models."""
    marks = {"": "refused", "own": "own"}
    counts = Counter(cell.held_by or "refused" for cell in cells)
    lines = [
        "# What was composed and opened",
        "",
        "Written by `.venv/bin/python benchmarks/matrix.py`, which composed every cell at toy size, took the gradient",
        "of a sample with a picture, saved, exported and opened the export again",
        f"({len(cells)} cells, {seconds:.0f} s). A cell names the class of transformers that opened it with the same",
        "logits and the same greedy answer: **L** is LlavaForConditionalGeneration; **own** is mmit's own layout,",
        "where no class holds it. **+o** says that LLaVA's original layout holds it too, read back with the same bits.",
        "",
        "In all: " + ", ".join(f"{name} {count}" for name, count in counts.most_common()) + ".",
        "",
    ]
    short = {"LlavaForConditionalGeneration": "L"}
    language_models = [name for name in LANGUAGE_MODELS if any(cell.language_model == name for cell in cells)]
    for encoder in dict.fromkeys(cell.encoder for cell in cells):
        lines += [
            f"## {encoder}",
            "",
            "| | " + " | ".join(language_models) + " |",
            "|---" * (len(language_models) + 1) + "|",
        ]
        for connector in dict.fromkeys(cell.connector for cell in cells):
            row = {c.language_model: c for c in cells if (c.encoder, c.connector) == (encoder, connector)}
            shown = [
                (short.get(cell.held_by) or marks.get(cell.held_by, cell.held_by)) + (" +o" if cell.original else "")
                for cell in (row[name] for name in language_models if name in row)
            ]
            lines.append(f"| {connector} | " + " | ".join(shown) + " |")
        lines.append("")
    failures = dict.fromkeys(f"- {c.encoder}, {c.connector}: {c.failure}" for c in cells if c.failure)
    return "\n".join([*lines, *(["Refused:", "", *failures, ""] if failures else [])])


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--out", type=Path, default=ROOT / "docs" / "matrix.md")
    words.add_argument("--limit", type=int, default=0, help="try the first so many cells only")
    words.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    asked = words.parse_args()
    warnings.simplefilter("ignore")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="matrix-") as name:
        parts = Path(name)
        sections = write_parts(parts)
        tasks = [
            (encoder, connector, llm, content(sections[encoder], CONNECTORS[connector], parts / llm, llm), parts)
            for encoder, connector, llm in itertools.product(sections, CONNECTORS, LANGUAGE_MODELS)
        ]
        tasks = tasks[: asked.limit or None]
        with multiprocessing.get_context("spawn").Pool(asked.processes, initializer=name_toys) as pool:
            cells = []
            for cell in pool.imap(run_cell, tasks, chunksize=4):
                cells.append(cell)
                if len(cells) % 50 == 0:
                    print(f"{len(cells)} of {len(tasks)} cells, {time.perf_counter() - started:.0f} s", flush=True)
    asked.out.write_text(page(cells, seconds=time.perf_counter() - started), encoding="utf-8")
    print(f"wrote {asked.out}")


def name_toys() -> None:
    """Make the names of the toy ViTs known to timm; called in every process."""
    import tiny_timm  # noqa: F401 - importing it is what does it


def write_parts(parts: Path) -> dict[str, Any]:
    """The toy language models and encoders below ``parts``; the encoders' sections."""
    from family_factories import write_family
    from transformers import MistralConfig

    for family in LANGUAGE_MODELS:
        write_family(family, parts)
    # the tests' window of 4 tokens, in 2 layers, would keep the answer from seeing the picture
    window = MistralConfig.from_pretrained(parts / "mistral")
    window.sliding_window = 128
    window.save_pretrained(parts / "mistral")
    return encoder_sections(parts / "encoders")


def content(encoder: Any, connector: dict[str, Any], path: Path, family: str) -> dict[str, Any]:
    """The ``model`` section of a cell."""
    from family_factories import FAMILIES

    template = FAMILIES[family].template
    return {
        "encoder": encoder,
        "connector": connector,
        "language_model": {"path": str(path), "template": template},
    }


if __name__ == "__main__":
    main()
