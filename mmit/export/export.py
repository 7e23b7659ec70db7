"""``mmit export``: a model directory in another format, or nothing where it would not be the same model there."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from mmit.config import WholeModel
from mmit.errors import CheckpointError, ConfigError
from mmit.export.probes import Probe, probe
from mmit.export.verify import Facts, Proof, prove_by_mmit, prove_by_transformers, prove_language_model
from mmit.models.formats import Target, choose_target
from mmit.models.formats.original import ORIGINAL
from mmit.models.formats.own import OWN
from mmit.models.formats.plain_llm import PLAIN_LLM
from mmit.models.load import load_model, open_section
from mmit.models.loaded import LoadedModel
from mmit.models.save import save_model, take_place

To = Literal["hf", "llava", "mmit"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions by their names on the command line."""

_BY_CONFIG = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}


def export(model: WholeModel, out: Path | str, *, to: To, llm_only: bool = False, dtype: str = "auto") -> list[str]:
    """Write ``model`` to the new directory ``out`` and return what is to be told: the format, the proof, remarks.

    to: ``hf`` for the class of transformers that holds the model (mmit's own layout where none does), ``llava`` for
    LLaVA's original code, ``mmit`` for mmit's own. llm_only: the language model alone, as a plain directory. dtype:
    ``auto`` keeps what the directory says, else a name of ``DTYPES``. Raises ConfigError for an ``out`` that exists,
    CheckpointError for a model that the format cannot hold or that came back changed; then ``out`` does not exist.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists; give a directory that does not exist, or is empty")
    precision = _precision(model, dtype)
    loaded = load_model(model, dtype=precision)
    target = _target(loaded, to, llm_only=llm_only)
    remarks = _remarks(loaded, target)
    made_from = {"exported_from": str(Path(model.path).absolute())}
    fresh = out.with_name(f".{out.name}.exporting")
    try:
        save_model(loaded, None, fresh, made_from=made_from, to=target, place=out)
        loaded.model.float()
        probes = probe(loaded, only_text=target.writer is PLAIN_LLM)
        if target.writer.opens_as or target.writer is PLAIN_LLM:
            facts = Facts.of(loaded)
            del loaded  # one model in memory at a time
            gc.collect()
            proof = _prove_by_transformers(fresh, target, probes, facts)
        else:
            proof = prove_by_mmit(fresh, probes, loaded, stored=precision)
        take_place(fresh, out)
    except OSError as error:
        raise CheckpointError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    name = str(precision).removeprefix("torch.")
    return [f"wrote {out}: {_title(target)}, {name}", str(proof), *remarks]


def _precision(model: WholeModel, dtype: str) -> torch.dtype:
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ConfigError(f"--dtype {dtype}: take auto, {', '.join(DTYPES)}")
        return DTYPES[dtype]
    contents, _ = open_section(model)
    text = contents.config.get("text_config")
    found = [
        fields.get(key)
        for fields in (contents.config, text if isinstance(text, dict) else {})
        for key in ("torch_dtype", "dtype")
    ]
    return next((_BY_CONFIG[str(name)] for name in found if str(name) in _BY_CONFIG), torch.float32)


def _target(loaded: LoadedModel, to: To, *, llm_only: bool) -> Target:
    if llm_only:
        return Target("language model", PLAIN_LLM)
    if to == "hf":
        return choose_target(loaded.model, loaded.style)
    form = ORIGINAL if to == "llava" else OWN
    assert form.write is not None, "both can be written"
    reason = form.write.why_not(loaded.model)
    if reason is not None:
        raise CheckpointError(f"{form.title} cannot hold this model: {reason}")
    return Target(form.name, form.write)


def _prove_by_transformers(directory: Path, target: Target, probes: Sequence[Probe], facts: Facts) -> Proof:
    if target.writer is PLAIN_LLM:
        return prove_language_model(directory, probes, facts)
    return prove_by_transformers(directory, target.writer.opens_as, probes, facts)


def _title(target: Target) -> str:
    if target.writer is PLAIN_LLM:
        return "the language model alone"
    if target.writer.opens_as:
        return f"{target.writer.opens_as} of transformers"
    return "LLaVA's original layout" if target.name == ORIGINAL.name else "mmit's own layout"


def _remarks(loaded: LoadedModel, target: Target) -> list[str]:
    """What the user must know of the written directory."""
    remarks = []
    if target.name == OWN.name and target.refused:
        remarks.append(f"no class of transformers holds this model: {'; '.join(target.refused)}")
    if target.name == ORIGINAL.name:
        remarks.append(
            "no class of the original code is installed here: names and weights were compared by mmit's reader"
        )
        if loaded.style == "hf":
            remarks.append(
                "the original code tokenizes the text behind a picture on its own, this model was trained on the whole "
                "text: with a Llama tokenizer its prompts get one space token more"
            )
    if target.writer.opens_as and loaded.style == "llava":
        remarks.append(
            "this model was trained on text tokenized piece by piece, as LLaVA's original code does; transformers' "
            "processor tokenizes the whole text: with a Llama tokenizer it leaves out the space token behind a picture"
        )
    return remarks
