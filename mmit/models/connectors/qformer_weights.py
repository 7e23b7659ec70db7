"""Weights to start a Q-Former from: a BERT, a BLIP-2 or InstructBLIP model of transformers, or a file of LAVIS.

All four have the same tensors under other names. A BERT knows neither queries nor attention to patches: these start
fresh, and the queries' half of each layer starts as the text's, as BLIP-2 did (arXiv 2301.12597, sec. 3.2). The last
linear layer, which belongs to a language model, always starts fresh.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from mmit.errors import ConfigError
from mmit.models.connectors.qformer import QFormer
from mmit.models.pickles import read_pickled
from mmit.models.stored import Source, StoredTensors, weight_files

_TABLES = ("embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight")
"""Of which the first rows are taken, as many as both sides have."""

_PREFIXES = ("Qformer.bert.", "qformer.", "bert.")
_PARTS = ("embeddings.", "encoder.layer.", "layernorm.")
_LEFT_OUT = ("position_ids", "token_type_embeddings.weight")
_RENAMED = (
    (".self.", ".attention."),
    ("embeddings.LayerNorm.", "embeddings.layernorm."),
    ("LayerNorm.gamma", "LayerNorm.weight"),  # as the first BERTs were stored
    ("LayerNorm.beta", "LayerNorm.bias"),
    ("layernorm.gamma", "layernorm.weight"),
    ("layernorm.beta", "layernorm.bias"),
)
_FRESH_AFTER_BERT = (".crossattention.", "query_tokens")


@torch.no_grad()
def start_from(connector: QFormer, path: str) -> None:
    """Fill ``connector`` with the weights at ``path``: a model directory, or a ``.pth`` file of LAVIS.

    Raises ConfigError where tensors are missing or of another shape, CheckpointError for damaged files.
    """
    stored = _read(Path(path).expanduser())
    if not any(".crossattention." in name for name in stored):
        stored |= {_of_queries(name): tensor for name, tensor in stored.items() if _of_queries(name) != name}
        fresh: tuple[str, ...] = _FRESH_AFTER_BERT
    else:
        fresh = ()
    wanted = {
        _plain(name): parameter
        for name, parameter in connector.named_parameters()
        if not name.startswith("language_projection.") and not any(part in name for part in fresh)
    }
    if missing := sorted(wanted.keys() - stored.keys()):
        some = ", ".join(missing[:3])
        raise ConfigError(f"model.connector.pretrained: {path} lacks {len(missing)} tensors of this Q-Former ({some})")
    for name, parameter in wanted.items():
        given = stored[name]
        if name in _TABLES and given.shape[1:] == parameter.shape[1:]:
            rows = min(len(given), len(parameter))
            parameter[:rows] = given[:rows].to(parameter.dtype)
            continue
        if given.shape != parameter.shape:
            raise ConfigError(
                f"model.connector.pretrained: {path}: {name} is {tuple(given.shape)}, this Q-Former's is "
                f"{tuple(parameter.shape)}; make model.connector and the encoder fit"
            )
        parameter.copy_(given.to(parameter.dtype))


def plain_name(stored: str) -> str | None:
    """A stored tensor's name in transformers' InstructBLIP Q-Former, or None for one that is none of a Q-Former."""
    if stored == "query_tokens":
        return stored
    name = next((stored.removeprefix(prefix) for prefix in _PREFIXES if stored.startswith(prefix)), stored)
    if not name.startswith(_PARTS) or name.endswith(_LEFT_OUT):
        return None
    for old, new in _RENAMED:
        name = name.replace(old, new)
    return f"embeddings.{name}" if name.startswith("layernorm.") else name


def _plain(name: str) -> str:
    plain = plain_name(name)
    assert plain is not None, f"{name} is a parameter of a Q-Former"
    return plain


def _of_queries(name: str) -> str:
    """The queries' twin of a feed-forward tensor of the text; any other name as it is."""
    return re.sub(r"^(encoder\.layer\.\d+\.(?:intermediate|output))\.", r"\1_query.", name)


def _read(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        with StoredTensors([Source(files=weight_files(path), rename=plain_name)], where=path) as stored:
            return {name: stored.read((name,)) for name in stored.shapes}
    if not path.is_file():
        raise ConfigError(f"model.connector.pretrained: there is no directory or file {path}")
    found = read_pickled(path, inside="model")
    return {name: tensor for stored, tensor in found.items() if (name := plain_name(stored)) is not None}
