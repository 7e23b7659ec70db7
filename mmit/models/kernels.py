"""Which kernels the layers of a language model run with around their attention: torch's own, or Liger's on GPUs.

Liger (arXiv 2410.10989) has Triton kernels for norms, gated feed-forward parts and rotary positions, each in one pass
over memory. Its cross-entropy is not taken: the loss computes logits at labelled positions only, in pieces. The one
place that decides: modules keep their class, names and parameters, and get another ``forward``.
"""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mmit.errors import ConfigError
from mmit.models.language_models import token_table
from mmit.models.placement import Placement, runnable

LIGER = "liger"
TORCH = "torch"
RUNS_ON = "cuda"
"""The kind of device that Liger's kernels are taken on."""
_PACKAGE = "liger_kernel"
_PATCHES = "liger_kernel.transformers.monkey_patch"
_LENGTH = 16

logger = logging.getLogger("mmit")


def use_kernels(language_model: PreTrainedModel, asked: str, kept: Placement, *, is_compiled: bool = False) -> str:
    """Give the layers the kernels that are asked for, where they lie, and return their name.

    asked: ``auto`` takes Liger's where they serve. kept: where the parameters live. is_compiled: torch compiles the
    layers. Kernels are tried on a row before they stay. Raises ConfigError where ``liger`` cannot be had; collective
    under a placement that shares parameters out.
    """
    reason = "as asked"
    if asked != TORCH:
        compiled = "torch compiles the layers" if is_compiled else ""
        reason = compiled or why_no_liger_here(language_model.device) or why_no_liger(language_model)
        reason = reason or _put_in(language_model, kept)
    if reason and asked == LIGER:
        raise ConfigError(f"kernels: liger does not serve here: {reason}; set it to auto")
    chosen = TORCH if reason else LIGER
    logger.info("kernels of %s: %s%s", type(language_model).__name__, chosen, f" ({reason})" if reason else "")
    return chosen


def why_no_liger_here(device: torch.device) -> str:
    """Why a device does not run Liger's kernels; empty where it does."""
    return "" if device.type == RUNS_ON else f"Liger's kernels run on GPUs only and the model is on {device.type}"


def why_no_liger(language_model: PreTrainedModel) -> str:
    """Why Liger has no kernels for a model here, whatever the device; empty where it has."""
    if find_spec(_PACKAGE) is None:
        return "the package liger-kernel is not installed (pip install 'mmit[gpu]')"
    family = language_model.config.model_type
    known = import_module(_PATCHES).MODEL_TYPE_TO_APPLY_LIGER_FN
    return "" if family in known else f"Liger has no kernels for the family '{family}'"


def _put_in(language_model: PreTrainedModel, kept: Placement) -> str:
    """Put Liger's kernels in; the reason, and everything as it was, where they fail or give another model."""
    modules = [(one, dict(vars(one))) for one in language_model.modules()]
    source = vars(sys.modules[type(language_model).__module__])
    names, before = dict(source), _states(language_model, kept)

    def undo() -> None:
        source.update(names)
        for module, attributes in modules:
            vars(module).clear()
            vars(module).update(attributes)

    try:
        put_in = import_module(_PATCHES)._apply_liger_kernel_to_instance
        put_in(model=language_model, cross_entropy=False, fused_linear_cross_entropy=False)
        difference = float((_states(language_model, kept) - before).abs().max())
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError) as error:  # another transformers' layers
        undo()
        return f"Liger's kernels fail here ({' '.join(str(error).split())[:120]})"
    if not difference <= 32 * torch.finfo(before.dtype).eps * float(before.abs().max()):  # also for a NaN
        undo()
        return f"Liger's kernels give other states (by {difference:.2g})"
    # Models made later are torch's again, but for rotary positions: a function that all of a family call by its name.
    source.update({name: value for name, value in names.items() if isinstance(value, type)})
    return ""


@torch.no_grad()
def _states(language_model: PreTrainedModel, kept: Placement) -> Tensor:
    """The last hidden states of a row of two samples."""
    table, device, first = token_table(language_model), language_model.device, 5
    ids = (torch.arange(_LENGTH, device=device) * 7 + 3) % table.num_embeddings
    positions = torch.cat([torch.arange(first), torch.arange(_LENGTH - first)])[None].to(device)
    with runnable(language_model, kept):
        return language_model.base_model(
            inputs_embeds=table(ids)[None], position_ids=positions, use_cache=False
        ).last_hidden_state
