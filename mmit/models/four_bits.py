"""The linear layers of a frozen language model in four bits: NF4 of QLoRA (arXiv 2305.14314, section 3).

Each 64 weights of a row-major matrix share the fp32 number of the largest one's size, and each is one of 16 values
between -1 and 1 times it: 4.5 bits per weight. A weight that was rounded so is a fixed point: rounding it again gives
the same bits, so a model may be saved unpacked and packed again. (The second rounding of QLoRA, of the shared numbers,
would save another 0.4 bits and has no such fixed points.) The only module that imports bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mmit.errors import MissingExtra
from mmit.models.adapter_names import is_adapter, plain_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BLOCK = 64
_SIZE_BYTES = 4
"""Of the number that a block's weights share."""


class FourBitLinear(nn.Module):
    """A linear layer whose weight lies in four bits; the product is computed in the precision the layer had."""

    codes: Tensor
    sizes: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = linear.weight.dtype
        codes, state = _library().functional.quantize_4bit(
            linear.weight.detach(), blocksize=_BLOCK, quant_type="nf4", compress_statistics=False
        )
        self.register_buffer("codes", codes, persistent=False)
        # As integers: a change of the model's precision casts buffers of floating point, and would round them.
        self.register_buffer("sizes", state.absmax.view(torch.int32), persistent=False)
        self.register_buffer("values", state.code.view(torch.int32), persistent=False)
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """The weight (out, in) that the four bits stand for, made anew."""
        library = _library().functional
        state = library.QuantState(
            absmax=self.sizes.view(torch.float32),
            shape=torch.Size((self.out_features, self.in_features)),
            dtype=self.dtype,
            blocksize=_BLOCK,
            code=self.get_buffer("values").view(torch.float32),
            quant_type="nf4",
        )
        return library.dequantize_4bit(self.codes, state)

    def forward(self, inputs: Tensor) -> Tensor:
        """``inputs`` times the weight, plus the bias; the weight is made anew in the backward pass, not kept."""
        outputs = _Product.apply(inputs, self)
        return outputs if self.bias is None else outputs + self.bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: FourBitLinear) -> Tensor:  # noqa: ANN401  (torch's context)
        ctx.layer = layer
        return functional.linear(inputs, layer.weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        return grad @ ctx.layer.weight, None


@torch.no_grad()
def round_weights(language_model: PreTrainedModel) -> None:
    """Round each weight that ``pack`` will pack to what four bits can say."""
    for _, linear in _linear_layers(language_model):
        linear.weight.copy_(FourBitLinear(linear).weight)


def pack(language_model: PreTrainedModel) -> None:
    """Put every linear layer but the head, and those of an adapter, into four bits, in place."""
    for name, linear in _linear_layers(language_model):
        language_model.set_submodule(name, FourBitLinear(linear))


def packed_sizes(language_model: PreTrainedModel) -> dict[str, int]:
    """Bytes of each weight that ``pack`` puts into four bits, by the name of its parameter in the language model."""
    return {
        f"{name}.weight": linear.weight.numel() // 2 + -(-linear.weight.numel() // _BLOCK) * _SIZE_BYTES
        for name, linear in _linear_layers(language_model)
    }


def unpacked(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights that lie in four bits, by the names of their parameters before, on the CPU."""
    for name, module in model.named_modules():
        if isinstance(module, FourBitLinear):
            yield plain_name(f"{name}.weight"), module.weight.cpu()


def packed_outline(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Shape and dtype of the same, without storage."""
    for name, module in model.named_modules():
        if isinstance(module, FourBitLinear):
            shape = (module.out_features, module.in_features)
            yield plain_name(f"{name}.weight"), torch.empty(shape, dtype=module.dtype, device="meta")


def _linear_layers(language_model: PreTrainedModel) -> list[tuple[str, nn.Linear]]:
    head = language_model.get_output_embeddings()
    return [
        (name, module)
        for name, module in language_model.named_modules()
        if type(module) is nn.Linear and module is not head and not is_adapter(f".{name}")
    ]


def _library() -> Any:  # noqa: ANN401  (a module)
    try:
        import bitsandbytes
    except ImportError as error:
        raise MissingExtra("bitsandbytes", "qlora", "lora.quantize: nf4") from error
    return bitsandbytes
