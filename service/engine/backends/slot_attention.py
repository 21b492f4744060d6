"""KV slots behind a Hugging Face cache, and the attention that reads them in place.

A slot holds keys and values of one episode, position = hour:

    slot s:  |0 ......... p-1| p |p+1 ........... 199|
              written before  now  stale or never written: not read

A prompt, where there is one, lies before the hours of every slot and is written once: position =
length of the prompt + hour.

A row at position p of slot s writes K and V at p and then attends to [0, p], nothing else. All rows
of a tick write before any row attends, layer by layer, so rows of one episode at consecutive hours
may share a tick. What a row computes involves its own slot and its own length only: the
other rows can neither widen its sums nor change their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache

ATTENTION = "llm4ehr_slots"


@dataclass(slots=True)
class SlotRows:
    """What the attention of one layer needs: the pool of that layer and the rows of this tick."""

    pool: Tensor  # [slots, kv heads, positions, D]
    slots: list[int]
    lengths: list[int]


class SlotCache(Cache):
    """One K and one V tensor a layer, [slots + 1, kv heads, positions, D]; the last slot is scrap.

    Rows that only fill up the tick write to it. `begin_tick` says where the rows belong. `prompt`
    are keys and values [kv heads, K, D] of each layer; the positions are `hours` more than K.
    """

    def __init__(
        self,
        n_layers: int,
        n_slots: int,
        n_kv_heads: int,
        hours: int,
        head_dim: int,
        prompt: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> None:
        super().__init__(layers=[])
        self._first = prompt[0][0].shape[1] if prompt else 0
        shape = (n_slots + 1, n_kv_heads, self._first + hours, head_dim)
        self.keys = [torch.zeros(shape) for _ in range(n_layers)]
        self.values = [torch.zeros(shape) for _ in range(n_layers)]
        for layer, (keys, values) in enumerate(prompt):
            self.keys[layer][:, :, : self._first] = keys
            self.values[layer][:, :, : self._first] = values
        self.scrap = n_slots
        self._slot = torch.zeros(0, dtype=torch.long)
        self._position = torch.zeros(0, dtype=torch.long)
        self._slots: list[int] = []
        self._lengths: list[int] = []

    def begin_tick(self, slots: list[int], hours: list[int], n_rows: int) -> Tensor:
        """Set the rows of the next forward, filled up to `n_rows`; returns hours [n_rows, 1]."""
        fill = n_rows - len(slots)
        self._slots = slots
        self._lengths = [self._first + hour + 1 for hour in hours]
        self._slot = torch.tensor(slots + [self.scrap] * fill)
        hour = torch.tensor(hours + [0] * fill)
        self._position = self._first + hour
        return hour[:, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Write the new keys and values [R, kv heads, 1, D]; hand the pools to the attention."""
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys[self._slot, :, self._position] = key_states[:, :, 0]
        values[self._slot, :, self._position] = value_states[:, :, 0]
        return (
            SlotRows(keys, self._slots, self._lengths),
            SlotRows(values, self._slots, self._lengths),
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Always 0: rows carry their own positions."""
        return 0


def slot_attention(
    module: nn.Module,
    query: Tensor,
    key: SlotRows,
    value: SlotRows,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of rows [R, heads, 1, D], each over its own prefix. Returns [R, 1, heads, D]."""
    out = torch.zeros_like(query)
    grouped = key.pool.shape[1] != query.shape[1]
    for row, (slot, length) in enumerate(zip(key.slots, key.lengths, strict=True)):
        out[row] = nn.functional.scaled_dot_product_attention(
            query[row : row + 1],
            key.pool[slot : slot + 1, :, :length],
            value.pool[slot : slot + 1, :, :length],
            scale=scaling,
            enable_gqa=grouped,
        )[0]
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, slot_attention)
