"""KV slots behind a Hugging Face cache, and the attention that reads them in place.

A slot holds keys and values of one episode, position = hour:

    slot s:  |0 ......... p-1| p |p+1 ........... 199|
              written before  now  stale or never written: not read

What every episode begins with (a prompt, a begin token) lies before the hours of every slot and is
written once: position = its length + hour.

A row at position p of slot s writes K and V at p and then attends to [0, p], nothing else. All rows
of a tick write before any row attends, layer by layer, so rows of one episode at consecutive hours
may share a tick. What a row computes involves its own slot and its own length only: the
other rows can neither widen its sums nor change their order.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from service.engine.backends.slot_kernel import SlotKernel, check_rows

ATTENTION = "llm4ehr_slots"


_caches: WeakValueDictionary[int, SlotCache] = WeakValueDictionary()
_numbers = itertools.count()


@dataclass(frozen=True, slots=True, eq=False)
class SlotRows:
    """What the attention of one layer gets in the place of keys or values."""

    cache: SlotCache
    layer: int
    new: Tensor  # [R, kv heads, 1, D], of the rows of this tick


class SlotCache(Cache):
    """One K and one V tensor a layer, [slots, kv heads, positions, D].

    `begin_tick` says where the rows belong. `first` are keys and values [kv heads, K, D] of each
    layer that every slot begins with; the positions are `hours` more than K. With a `library` the
    compiled kernel attends, without one the attention of torch does.
    """

    def __init__(
        self,
        n_layers: int,
        n_slots: int,
        n_kv_heads: int,
        hours: int,
        head_dim: int,
        first: Sequence[tuple[Tensor, Tensor]] = (),
        library: ctypes.CDLL | None = None,
    ) -> None:
        super().__init__(layers=[])
        self.number = next(_numbers)
        _caches[self.number] = self
        self.n_slots = n_slots
        self.n_first = first[0][0].shape[1] if first else 0
        shape = (n_slots, n_kv_heads, self.n_first + hours, head_dim)
        self.keys = [torch.zeros(shape) for _ in range(n_layers)]
        self.values = [torch.zeros(shape) for _ in range(n_layers)]
        for layer, (keys, values) in enumerate(first):
            self.keys[layer][:, :, : self.n_first] = keys
            self.values[layer][:, :, : self.n_first] = values
        self._kernel = SlotKernel(library, self.keys, self.values) if library else None
        self._slots: list[int] = []
        self._lengths: list[int] = []

    def begin_tick(self, slots: Sequence[int], hours: Sequence[int], n_rows: int) -> Tensor:
        """Set the rows of the next forward, filled up to `n_rows`; returns hours [n_rows, 1]."""
        self._slots = list(slots)
        self._lengths = [self.n_first + hour + 1 for hour in hours]
        if self._kernel is not None:
            self._kernel.begin(self._slots, self._lengths, n_rows)
        else:
            check_rows(self.keys[0].shape, self._slots, self._lengths, n_rows)
        return torch.tensor([*hours] + [0] * (n_rows - len(hours)))[:, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Hand the new keys and values [R, kv heads, 1, D] to the attention, which keeps them."""
        return SlotRows(self, layer_idx, key_states), SlotRows(self, layer_idx, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Always 0: rows carry their own positions."""
        return 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor, layer: int, scale: float) -> Tensor:
        """Keep `key` and `value` [R, kv heads, 1, D], then attend with `query` [R, heads, 1, D].

        Returns [R, 1, heads, D]; zeros for the rows that fill up the tick, which are not kept.
        """
        if self._kernel is not None:
            return self._kernel(layer, query, key, value, scale)
        keys, values, n = self.keys[layer], self.values[layer], len(self._slots)
        slot, position = torch.tensor(self._slots), torch.tensor(self._lengths) - 1
        keys[slot, :, position] = key[:n, :, 0]
        values[slot, :, position] = value[:n, :, 0]
        out = torch.zeros(query.shape)
        for row, (s, length) in enumerate(zip(self._slots, self._lengths, strict=True)):
            out[row] = nn.functional.scaled_dot_product_attention(
                query[row : row + 1],
                keys[s : s + 1, :, :length],
                values[s : s + 1, :, :length],
                scale=scale,
                enable_gqa=key.shape[1] != query.shape[1],
            )[0]
        return out.transpose(1, 2).contiguous()


def attend(
    query: Tensor, key: Tensor, value: Tensor, cache: int, layer: int, scale: float
) -> Tensor:
    """`SlotCache.attend` of the cache with that number, as an operation of torch."""
    return _caches[cache].attend(query, key, value, layer, scale)


_library = torch.library.Library("llm4ehr", "FRAGMENT")  # type: ignore[no-untyped-call]
_SCHEMA = "(Tensor query, Tensor key, Tensor value, int cache, int layer, float scale) -> Tensor"
_library.define("slot_attention" + _SCHEMA)  # type: ignore[no-untyped-call]
_library.impl("slot_attention", attend, "CPU")  # type: ignore[no-untyped-call]
_operation = torch.ops.llm4ehr.slot_attention.default

WITHOUT_DISPATCH = {_operation: attend}
"""The operation and the function that does it, for who repeats operations by itself."""


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
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _operation(query, key.new, value.new, key.cache.number, key.layer, scale), None


AttentionInterface.register(ATTENTION, slot_attention)
