"""Bottleneck adapters: two small trained networks in every block of a backbone.

Houlsby et al. 2019: after the attention and after the feed-forward part of a block, each before its
residual is added. Every family ends both parts with a linear projection, so an adapter reads and
corrects the output of that projection. It is hung onto the projection by a hook rather than put in
its place: the names of the backbone's own weights stay as they are, and weights saved without
adapters load into a network that has them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llm4ehr.backbone import Backbone

# The projections that end the attention and the feed-forward part of a block, by family.
_PROJECTIONS = {
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "opt": ("self_attn.out_proj", "fc2"),
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "bert": ("attention.output.dense", "output.dense"),
    "roberta": ("attention.output.dense", "output.dense"),
}
_INIT_STD = 1e-3  # so that an untrained adapter changes next to nothing


class Adapter(nn.Module):
    """Down, GELU, up: y [..., H] -> correction of y [..., H] through `width` channels."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(hidden, width)
        self.up = nn.Linear(width, hidden)
        for layer in (self.down, self.up):
            nn.init.trunc_normal_(layer.weight, std=_INIT_STD, a=-2 * _INIT_STD, b=2 * _INIT_STD)
            nn.init.zeros_(layer.bias)

    def forward(self, y: Tensor) -> Tensor:
        """The correction alone; the caller adds it to y."""
        correction: Tensor = self.up(nn.functional.gelu(self.down(y)))
        return correction


def add_adapters(backbone: Backbone, width: int) -> None:
    """Give every block two adapters, 2 * layers * (2 * H * width + H + width) parameters in all.

    They learn whether the backbone is frozen or not. Raises ValueError for a width below 1.
    """
    if width < 1:
        raise ValueError(f"an adapter of width {width}: at least 1 is needed")
    ends = tuple(f".{name}" for name in _PROJECTIONS[backbone.spec.model_type])
    for name, module in list(backbone.model.named_modules()):
        if name.endswith(ends):
            module.add_module("adapter", Adapter(backbone.hidden_size, width))
            module.register_forward_hook(_adapt)


def _adapt(projection: nn.Module, _: tuple[torch.Tensor, ...], y: Tensor) -> Tensor:
    correction: Tensor = projection.get_submodule("adapter")(y)
    return y + correction
