"""Linear layers with weights laid out for the processor beforehand, if asked in bfloat16.

The layout is that of oneDNN, which torch carries. Plain weights are laid out anew in every product,
which costs more than the product itself when rows are few.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Precision = Literal["fp32", "bf16"]

_LARGE = 1 << 17  # weights; the product of a smaller matrix takes less time than the call


class PackedLinear:
    """x W^T + b for x [..., in] in float32; with bfloat16 both factors are rounded, sums are not.

    The product of bfloat16 is rounded to it before the bias is added.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, precision: Precision) -> None:
        """`weight` [out, in], `bias` [out]."""
        self._bf16 = precision == "bf16"
        weight = weight.detach().to(torch.bfloat16 if self._bf16 else torch.float32).contiguous()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self._bias = None if bias is None else bias.detach()

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if not self._bf16:
            return _product(x, self._packed, self._bias)
        y = _product(x.bfloat16(), self._packed, None).float()
        return y if self._bias is None else y + self._bias


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def pack_linears(backbone: nn.Module, precision: Precision) -> None:
    """Let the linear layers of a backbone compute with packed weights, in float32 the large ones.

    The layers stay where they are, with what is hung onto them; their own weights are dropped.
    Raises ValueError for a reduced precision where torch comes without oneDNN.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        if precision != "fp32":
            raise ValueError(f"{precision} needs a torch with oneDNN")
        return
    for layer in backbone.modules():
        if not isinstance(layer, nn.Linear | Conv1D):
            continue
        if precision == "fp32" and layer.weight.numel() < _LARGE:
            continue
        weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        layer.forward = PackedLinear(weight, layer.bias, precision)  # type: ignore[method-assign]
        layer.register_parameter("weight", None)
