"""Prompts: trained vectors that stand beside the hours of a stay (M18).

    prefix   p p p h0 h1 h2 ...   before the hours, whose positions shift by the length
    suffix   h0 h1 h2 p p p       after the last hour of each stay; a stay is read out from there
    kv       in every layer, keys and values that each hour attends to (Li & Liang 2021); positions
             of hours do not change

A prefix and a kv prompt are the same for all stays and come before every hour: an engine that keeps
keys and values writes them once. A suffix moves with the end of the stay and cannot be streamed.

Shape legend: B stays, T hours, K prompt length, H hidden, L layers, G key-value heads, D head size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from llm4ehr.backbone import Backbone

KeyValues: TypeAlias = Sequence[tuple[Tensor, Tensor]]
"""Keys and values of each layer, [G, K, D] both."""

_INIT_STD = 0.02  # as the word embeddings of the backbones


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSpec:
    """Which prompt. Raises ValueError for one that does not exist."""

    position: Literal["prefix", "suffix", "kv"]
    length: int

    def __post_init__(self) -> None:
        if self.position not in _KINDS or self.length < 1:
            raise ValueError(
                f"prompt {self.position!r} of length {self.length}: the position is one of "
                f"{', '.join(_KINDS)}, the length at least 1"
            )


class Prompt(nn.Module, ABC):
    """What the three have in common: a series pass with the prompt in its place.

    `n_positions` of the backbone go to the prompt, `shift` is added to the position of each hour.
    """

    def __init__(self, backbone: Backbone, length: int) -> None:
        super().__init__()
        self.length = length
        self.n_positions = length
        self.shift = 0

    @abstractmethod
    def forward(
        self,
        backbone: Backbone,
        tokens: Tensor,
        mask: Tensor,
        hours: Tensor,
        right_padded: bool = False,
    ) -> Tensor:
        """v [B, T, H] of `tokens` [B, T, H]; the rest is as the backbone takes it, [B, T] each."""

    @abstractmethod
    def key_values(self, backbone: Backbone) -> KeyValues:
        """What every hour attends to before any hour. Raises ValueError for a suffix."""


class PrefixPrompt(Prompt):
    """K vectors before the first hour."""

    def __init__(self, backbone: Backbone, length: int) -> None:
        super().__init__(backbone, length)
        self.shift = length
        self.vectors = _vectors(length, backbone.hidden_size)

    def forward(
        self,
        backbone: Backbone,
        tokens: Tensor,
        mask: Tensor,
        hours: Tensor,
        right_padded: bool = False,
    ) -> Tensor:
        """See `Prompt`."""
        hidden: Tensor = backbone(
            torch.cat([self.vectors.expand(len(tokens), -1, -1), tokens], dim=1),
            nn.functional.pad(mask, (self.length, 0), value=True),
            torch.cat([self._positions(hours).expand(len(hours), -1), hours + self.shift], dim=1),
            right_padded=right_padded,
        )
        return hidden[:, self.length :]

    def key_values(self, backbone: Backbone) -> KeyValues:
        """See `Prompt`."""
        cache = DynamicCache()
        here = self._positions(self.vectors)[None]
        backbone(self.vectors[None], torch.ones_like(here, dtype=torch.bool), here, cache)
        return [(keys[0], values[0]) for keys, values, _ in cache]

    def _positions(self, like: Tensor) -> Tensor:
        return torch.arange(self.length, device=like.device)


class SuffixPrompt(Prompt):
    """K vectors after the last hour of each stay, wherever that is in the batch."""

    def __init__(self, backbone: Backbone, length: int) -> None:
        super().__init__(backbone, length)
        self.vectors = _vectors(length, backbone.hidden_size)

    def forward(
        self,
        backbone: Backbone,
        tokens: Tensor,
        mask: Tensor,
        hours: Tensor,
        right_padded: bool = False,
    ) -> Tensor:
        """See `Prompt`. In a causal backbone the suffix changes no hour of the stay."""
        return self.with_summary(backbone, tokens, mask, hours, right_padded)[0]

    def with_summary(
        self,
        backbone: Backbone,
        tokens: Tensor,
        mask: Tensor,
        hours: Tensor,
        right_padded: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """v [B, T, H] and the mean state over the suffix [B, H]; v is void after a stay's end.

        The hours of a stay come first in its row of `mask`.
        """
        n_hours = tokens.shape[1]
        place = torch.arange(self.length, device=tokens.device)
        index = mask.sum(1, keepdim=True) + place  # [B, K]
        rows = index[..., None].expand(-1, -1, tokens.shape[2])
        room = nn.functional.pad(tokens, (0, 0, 0, self.length))
        hidden: Tensor = backbone(
            room.scatter(1, rows, self.vectors.to(room.dtype).expand_as(rows)),
            nn.functional.pad(mask, (0, self.length)).scatter(1, index, True),
            torch.cat([hours, hours[:, -1:] + 1 + place], dim=1),
            right_padded=right_padded,
        )
        return hidden[:, :n_hours], hidden.gather(1, rows).mean(1)

    def key_values(self, backbone: Backbone) -> KeyValues:
        """Raises ValueError: a suffix stands after the hours."""
        raise ValueError(
            "a suffix prompt follows the last hour of a stay: this network cannot be streamed"
        )


class KeyValuePrompt(Prompt):
    """K keys and values a layer. They are trained themselves, without a network that makes them."""

    def __init__(self, backbone: Backbone, length: int) -> None:
        super().__init__(backbone, length)
        if not backbone.spec.causal:
            raise ValueError("a kv prompt needs a causal backbone: attention_mode: causal")
        self.n_positions = 0
        layers, heads, size = key_value_shape(backbone)
        self.keys = _vectors(layers, heads, length, size)
        self.values = _vectors(layers, heads, length, size)

    def forward(
        self,
        backbone: Backbone,
        tokens: Tensor,
        mask: Tensor,
        hours: Tensor,
        right_padded: bool = False,
    ) -> Tensor:
        """See `Prompt`."""
        one_each = (len(tokens), -1, -1, -1)
        cache = DynamicCache(
            [(k.expand(one_each), v.expand(one_each)) for k, v in self.key_values(backbone)]
        )
        mask = nn.functional.pad(mask, (self.length, 0), value=True)
        hidden: Tensor = backbone(tokens, mask, hours, cache)
        return hidden

    def key_values(self, backbone: Backbone) -> KeyValues:
        """See `Prompt`."""
        return list(zip(self.keys, self.values, strict=True))


_KINDS: dict[str, type[Prompt]] = {
    "prefix": PrefixPrompt,
    "suffix": SuffixPrompt,
    "kv": KeyValuePrompt,
}


def make_prompt(spec: PromptSpec, backbone: Backbone) -> Prompt:
    """An untrained prompt for a backbone. Raises ValueError where the two do not go together."""
    return _KINDS[spec.position](backbone, spec.length)


def key_value_shape(backbone: Backbone) -> tuple[int, int, int]:
    """Layers, key-value heads and head size of a backbone: (L, G, D)."""
    config = backbone.model.config
    heads = int(config.num_attention_heads)
    return (
        int(config.num_hidden_layers),
        int(getattr(config, "num_key_value_heads", None) or heads),
        int(getattr(config, "head_dim", None) or config.hidden_size // heads),
    )


def _vectors(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape).normal_(std=_INIT_STD))
