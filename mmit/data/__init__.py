"""Data: published sets to shards (convert), and shards to batches (shard_set, lengths, plan, loader).

    source files --readers--> conversations --convert--> shards --shard_set--> conversations again, any of them at once
    shards --lengths--> tokens of every sample --plan--> rows of every step --loader--> batches of this rank

The names below are looked up when first used, since some of them need torch. ``convert`` is in ``mmit.data.convert``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmit.data.faults import BadSample, SampleError, StorageError
    from mmit.data.lengths import LengthTable, fit, measure_lengths
    from mmit.data.loader import Loader, StepBatches
    from mmit.data.mixture import Choice, choose, draws_by_root, draws_by_weight, draws_per_epoch, usable
    from mmit.data.plan import Plan, make_plan
    from mmit.data.recipe import Recipe, load_recipe
    from mmit.data.shard_set import ShardSet, open_source
    from mmit.data.shards import Manifest, ShardWriter

_WHERE = {
    "faults": ("BadSample", "SampleError", "StorageError"),
    "lengths": ("LengthTable", "fit", "measure_lengths"),
    "loader": ("Loader", "StepBatches"),
    "mixture": ("Choice", "choose", "draws_by_root", "draws_by_weight", "draws_per_epoch", "usable"),
    "plan": ("Plan", "make_plan"),
    "recipe": ("Recipe", "load_recipe"),
    "shard_set": ("ShardSet", "open_source"),
    "shards": ("Manifest", "ShardWriter"),
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [
    "BadSample",
    "Choice",
    "LengthTable",
    "Loader",
    "Manifest",
    "Plan",
    "Recipe",
    "SampleError",
    "ShardSet",
    "ShardWriter",
    "StepBatches",
    "StorageError",
    "choose",
    "draws_by_root",
    "draws_by_weight",
    "draws_per_epoch",
    "fit",
    "load_recipe",
    "make_plan",
    "measure_lengths",
    "open_source",
    "usable",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401  (PEP 562: the type is that of the name asked for)
    if name in _MODULE_OF:
        return getattr(import_module(f"mmit.data.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'mmit.data' has no attribute '{name}'")
