"""KV slots on a device, and attention over them without a loop over rows.

As in `slot_attention`, a row at position p of a slot writes its keys and values at p and attends to
[0, p]. Here slots and positions are tensors of fixed size on the device, so that a tick is the same
sequence of kernels whatever it computes and can be replayed as a CUDA graph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache

ATTENTION = "llm4ehr_device_slots"
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class DeviceRows:
    """What the attention of one layer needs: the pool of that layer and the rows of this tick."""

    pool: Tensor  # [slots, kv heads, positions, D]
    slots: Tensor  # [R] int64
    positions: Tensor  # [R] int64
    attend: Attend


class DeviceSlotCache(Cache):
    """One K and one V tensor a layer, [slots + 1, kv heads, positions, D]; the last slot is scrap.

    Rows that only fill up the tick write to it. `before` are keys and values [kv heads, K, D] of
    each layer that come before position 0 of every slot: a prompt, or the begin token.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        n_slots: int,
        n_positions: int,
        device: torch.device,
        attend: Attend,
        before: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> None:
        super().__init__(layers=[])
        n_layers, n_kv_heads, head_dim = shape
        self.first = before[0][0].shape[1] if before else 0
        pool = (n_slots + 1, n_kv_heads, self.first + n_positions, head_dim)
        self.keys = [torch.zeros(pool, device=device) for _ in range(n_layers)]
        self.values = [torch.zeros(pool, device=device) for _ in range(n_layers)]
        for layer, (keys, values) in enumerate(before):
            self.keys[layer][:, :, : self.first] = keys
            self.values[layer][:, :, : self.first] = values
        self.scrap = n_slots
        self._attend = attend
        self._slots = self._positions = torch.zeros(0, dtype=torch.int64, device=device)

    def begin_tick(self, slots: Tensor, positions: Tensor) -> None:
        """Set the rows of the next forward, [R] each; positions count from the first hour."""
        self._slots, self._positions = slots, positions + self.first

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Write the new keys and values [R, kv heads, 1, D]; hand the pools to the attention."""
        rows = []
        for pool, new in (
            (self.keys[layer_idx], key_states),
            (self.values[layer_idx], value_states),
        ):
            pool[self._slots, :, self._positions] = new[:, :, 0]
            rows.append(DeviceRows(pool, self._slots, self._positions, self._attend))
        return rows[0], rows[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Always 0: rows carry their own positions."""
        return 0


def device_attention(
    module: nn.Module,
    query: Tensor,
    key: DeviceRows,
    value: DeviceRows,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of rows [R, heads, 1, D], each over its own prefix. Returns [R, 1, heads, D]."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return key.attend(query, key.pool, value.pool, key.slots, key.positions, scale), None


def attend_by_gather(
    query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor, scale: float
) -> Tensor:
    """The same as `slot_attention_triton.attend` in torch alone, over copies of whole slots.

    Every row sums over all positions of a slot, of which those behind its own count as exactly 0.
    Elementwise products rather than a matrix product: no kernel is chosen by the number of rows.
    """
    n_rows, n_heads, _, size = query.shape
    n_kv_heads, n_positions = keys.shape[1:3]
    query = query.reshape(n_rows, n_kv_heads, n_heads // n_kv_heads, 1, size)
    behind = torch.arange(n_positions, device=query.device) > positions[:, None]
    behind = behind[:, None, None]  # [R, 1, 1, positions]
    k, v = (pool.index_select(0, slots)[:, :, None] for pool in (keys, values))
    score = (query * scale * k).sum(-1).masked_fill(behind, float("-inf"))
    # 0 times what a stranger left there would not be 0 if that is not finite.
    v = v.masked_fill(behind[..., None], 0.0)
    out = (torch.softmax(score, dim=-1)[..., None] * v).sum(-2)
    return out.reshape(n_rows, 1, n_heads, size)


def attention_for(device: torch.device) -> Attend:
    """The Triton kernel where it runs, else `attend_by_gather`."""
    if device.type != "cuda":
        return attend_by_gather
    try:
        from service.engine.backends.slot_attention_triton import attend

        # Compiled here for the first time, which also needs a C compiler.
        pool = torch.zeros(1, 1, 1, 16, device=device)
        at = torch.zeros(1, dtype=torch.int64, device=device)
        attend(pool, pool, pool, at, at, 1.0)
    except (torch.AcceleratorError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        _log.warning("attention without Triton, which is slower: %s", error)
        return attend_by_gather
    return attend


AttentionInterface.register(ATTENTION, device_attention)
