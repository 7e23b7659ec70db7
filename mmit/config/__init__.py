"""The schema of a run file: one YAML is one run.

Every model is frozen and refuses unknown keys; ``mmit.config_file`` reads the YAML, applies ``a.b=c`` overrides and
turns all mistakes of a file into one message. A config builds nothing: components take plain values.
"""

from __future__ import annotations

from pathlib import Path

from mmit.config.connectors import (
    AveragePoolConnector,
    CAbstractorConnector,
    Connector,
    Instruction,
    LinearConnector,
    MlpConnector,
    PerceiverConnector,
    PixelShuffleConnector,
    QFormerConnector,
)
from mmit.config.data import SUBSET, Batching, Data, Source
from mmit.config.encoders import Encoder, OneEncoder, OpenClipEncoder, TimmEncoder, TransformersEncoder
from mmit.config.insight import Evaluate, Log, Spike, Trackio, WandB
from mmit.config.model import ComposedModel, LanguageModel, Model, WholeModel
from mmit.config.parts import CustomPart
from mmit.config.run import NAME, RunConfig
from mmit.config.sections import Section, parse_count
from mmit.config.tiling import AnyresTiling, DynamicTiling
from mmit.config.training import Launch, Lora, Optim, Save, Stage, Zero

__all__ = [
    "NAME",
    "SUBSET",
    "AnyresTiling",
    "AveragePoolConnector",
    "Batching",
    "CAbstractorConnector",
    "ComposedModel",
    "Connector",
    "CustomPart",
    "Data",
    "DynamicTiling",
    "Encoder",
    "Evaluate",
    "Instruction",
    "LanguageModel",
    "Launch",
    "LinearConnector",
    "Log",
    "Lora",
    "MlpConnector",
    "Model",
    "OneEncoder",
    "OpenClipEncoder",
    "Optim",
    "PerceiverConnector",
    "PixelShuffleConnector",
    "QFormerConnector",
    "RunConfig",
    "Save",
    "Section",
    "Source",
    "Spike",
    "Stage",
    "TimmEncoder",
    "Trackio",
    "TransformersEncoder",
    "WandB",
    "WholeModel",
    "Zero",
    "load_config",
    "parse_count",
]


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """The checked run file at ``path`` with ``a.b=c`` overrides applied.

    Raises ConfigError with every mistake of the file, each with its path.
    """
    from mmit.config_file import read

    return read(Path(path), overrides or [])
