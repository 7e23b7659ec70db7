"""mmit: compose a vision-language model, teach it in stages, and know that it is right.

    import mmit
    chat = mmit.Chat.load("runs/demo/instruct")
    print(chat.ask("What colour is the circle?", images=["photo.png"]))

Importing this package imports no torch; the names below are looked up when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mmit.errors import CheckpointError, ConfigError, DataError, MmitError, TrainingError

if TYPE_CHECKING:
    from mmit.chat import Chat
    from mmit.config import RunConfig, load_config

__version__ = "0.1.0"
__all__ = [
    "Chat",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "MmitError",
    "RunConfig",
    "TrainingError",
    "__version__",
    "load_config",
]

_LAZY = {"Chat": "mmit.chat", "RunConfig": "mmit.config", "load_config": "mmit.config"}


def __getattr__(name: str) -> Any:  # noqa: ANN401  (PEP 562: the type is that of the name asked for)
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'mmit' has no attribute '{name}'")
