"""Connectors: from patch features to vectors that stand among the language model's token embeddings.

One module for each kind; ``build`` holds the table of them, ``checks`` what every connector must pass, also one's own.
"""

from mmit.models.connectors.build import build_connector
from mmit.models.connectors.checks import check_connector
from mmit.models.connectors.interface import (
    Connector,
    check_picture,
    idle_parameters,
    instruction_reader,
    keeps_grid,
    questions_for,
    reads_instruction,
)
from mmit.models.connectors.mlp import MlpProjector

__all__ = [
    "Connector",
    "MlpProjector",
    "build_connector",
    "check_connector",
    "check_picture",
    "idle_parameters",
    "instruction_reader",
    "keeps_grid",
    "questions_for",
    "reads_instruction",
]
