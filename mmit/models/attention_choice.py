"""Which attention a language model runs with, and proof that samples do not see each other under it."""

from __future__ import annotations

import logging
from importlib.util import find_spec

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mmit.errors import ConfigError
from mmit.models.attention import FLASH, PACKED, attention_arguments
from mmit.models.language_models import has_experts, token_table

KEEPS_SAMPLES_APART = {"full_attention", "sliding_attention", "chunked_attention"}
"""Layer types of transformers that look at positions only; others carry a state along the row."""

ON_GPU_ONLY = (FLASH, "flex_attention")
"""flash-attn has no kernel for CPUs; torch's flex attention gives NaN there at small sizes (torch 2.15)."""

logger = logging.getLogger("mmit")


def choose_attention(language_model: PreTrainedModel) -> str:
    """The attention that fits: ``mmit_packed`` where each head is plain causal softmax, else transformers' choice.

    Soft-capped scores (Gemma 2), attention sinks (GPT-OSS), chunked or linear attention, and models that do not go
    through transformers' attention interface keep the implementation they were built with.
    """
    if _is_soft_capped(language_model):
        return "eager"
    if _why_not_packed(language_model):
        return str(language_model.config.get_text_config()._attn_implementation)
    return PACKED


def set_attention(language_model: PreTrainedModel, asked: str) -> str:
    """Give a model the attention that is asked for (``auto`` chooses) and return its name.

    Raises ConfigError, naming the run file's key, where the model, the device or the machine cannot run it.
    """
    implementation = choose_attention(language_model) if asked == "auto" else asked
    reason = "" if asked == "auto" else why_not_here(language_model, asked) or why_not_ever(language_model, asked)
    if not reason and language_model.config._attn_implementation != implementation:
        try:
            language_model.set_attn_implementation(implementation)
        except (ValueError, ImportError) as error:
            reason = str(error).splitlines()[0]
        if not reason and language_model.config._attn_implementation != implementation:
            reason = f"{type(language_model).__name__} keeps '{language_model.config._attn_implementation}'"
    if reason:
        raise ConfigError(f"attention: {asked} does not serve here: {reason}; set it to auto")
    return implementation


def sliding_window(language_model: PreTrainedModel) -> int | None:
    """The smallest number of tokens that a layer looks back on, or None where all look back on everything."""
    window = getattr(language_model.config.get_text_config(), "sliding_window", None)
    return window if isinstance(window, int) and window > 0 else None


@torch.no_grad()
def packing_fault(language_model: PreTrainedModel, *, implementation: str) -> str:
    """Why samples may not share a row with this model: a sentence's first half; empty where they may.

    Tried on a row of a sample of one token and a sample of two. The logits of the second must not depend on the first,
    to the bit (in a mixture of experts, whose matrix products change their shapes, up to rounding), and must be those
    of the sample alone, up to rounding. Raises ConfigError where not even the padding behind a sample is out of sight.
    """
    kind = type(language_model).__name__
    table = token_table(language_model)
    rows = table.num_embeddings
    sample, others = [rows // 3, rows // 5], (rows // 2, rows // 7)

    def logits(ids: list[int], positions: list[int]) -> Tensor:
        device = language_model.device
        position_ids = torch.tensor([positions], device=device)
        out = language_model(
            inputs_embeds=table(torch.tensor([ids], device=device)),
            position_ids=position_ids,
            use_cache=False,
            **attention_arguments(position_ids, implementation=implementation, window=None),
        )
        return out.logits.float()

    alone = logits(sample, [0, 1])
    rounding = 8 * torch.finfo(table.weight.dtype).eps * float(alone.abs().max())
    padded, padded_otherwise = (logits([*sample, other], [0, 1, 0])[:, :2] for other in others)
    seen = max(float((padded - alone).abs().max()), float((padded - padded_otherwise).abs().max()))
    if not seen <= 4 * rounding:  # also for a NaN
        raise ConfigError(
            f"{kind} (attention '{implementation}') sees what stands behind a token: logits differ by {seen:.2g}; "
            "only causal language models can be trained"
        )
    if fault := carried_state(language_model):
        return fault
    packed, beside_another = (logits([other, *sample], [0, 0, 1])[:, 1:] for other in others)
    leak = float((packed - beside_another).abs().max())
    difference = float((packed - alone).abs().max())
    allowed = rounding if has_experts(language_model) else 0.0
    if leak <= allowed and difference <= 4 * rounding:
        return ""
    return (
        f"{kind} does not keep the samples of a packed row apart (attention '{implementation}': logits differ by "
        f"{difference:.2g} from the sample alone)"
    )


def carried_state(language_model: PreTrainedModel) -> str:
    """``packing_fault`` as far as the configuration tells it."""
    stateful = ", ".join(sorted(_layer_types(language_model) - KEEPS_SAMPLES_APART))
    carried = "carry a state from one sample of a packed row to the next"
    return stateful and f"{type(language_model).__name__} has layers of type {stateful}, which {carried}"


def why_not_here(
    language_model: PreTrainedModel, asked: str, *, device: str | None = None, dtype: torch.dtype | None = None
) -> str:
    """Why the device or the precision (by default the model's) cannot run an attention; empty where they can."""
    device, dtype = device or language_model.device.type, dtype or language_model.dtype
    if asked in ON_GPU_ONLY and device != "cuda":
        return f"it runs on GPUs only and the model is on {device}"
    if asked == FLASH and dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bf16, and the precision is {str(dtype).removeprefix('torch.')}"
    if asked == FLASH and find_spec("flash_attn") is None:
        return "the package flash-attn is not installed"
    return ""


def why_not_ever(language_model: PreTrainedModel, asked: str) -> str:
    """Why an attention would compute another model; empty where it would not."""
    if asked in (PACKED, "sdpa") and _is_soft_capped(language_model):
        return f"{type(language_model).__name__} caps its scores, which it would leave out"
    return _why_not_packed(language_model) if asked == PACKED else ""


def _why_not_packed(language_model: PreTrainedModel) -> str:
    kind = type(language_model).__name__
    if not language_model._supports_attention_backend:
        return f"{kind} does not go through transformers' attention interface"
    if special := _layer_types(language_model) - {"full_attention", "sliding_attention"}:
        return f"{kind} has layers of type {', '.join(sorted(special))}"
    if any(name.rsplit(".", 1)[-1] == "sinks" for name, _ in language_model.named_parameters()):
        return f"{kind} has attention sinks"
    return ""


def _is_soft_capped(language_model: PreTrainedModel) -> bool:
    return getattr(language_model.config.get_text_config(), "attn_logit_softcapping", None) is not None


def _layer_types(language_model: PreTrainedModel) -> set[str]:
    return set(getattr(language_model.config.get_text_config(), "layer_types", None) or ())
