"""Ticks in plain PyTorch on the CPU."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from llm4ehr.bundle import Network
from llm4ehr.prompts import key_value_shape
from service.engine.backends.base import TickResult
from service.engine.backends.slot_attention import ATTENTION, SlotCache


class RowDependenceError(RuntimeError):
    """On this machine the result of a row depends on the rows beside it."""


class TorchCpuBackend:
    """Every tick has the same number of rows, real ones first, so that the maths library always
    sees the same shapes: many of its kernels round differently for a few rows than for many.
    """

    def __init__(self, network: Network, *, n_slots: int, max_rows: int) -> None:
        if reason := network.not_online:
            raise ValueError(reason)
        # A copy: the attention implementation is a property of the backbone's config.
        self._model = copy.deepcopy(network.model).eval()
        prompt = self._model.prompt
        with torch.no_grad():
            before = prompt.key_values(self._model.backbone) if prompt else ()
        self._model.backbone.model.set_attn_implementation(ATTENTION)
        self.n_slots = n_slots
        self.max_rows = max_rows
        self._cache = SlotCache(
            **kv_shape(network),
            n_slots=n_slots,
            hours=network.preprocessing.max_hours,
            prompt=before,
        )

    @torch.inference_mode()
    def tick(
        self,
        series: NDArray[np.float32],
        events: NDArray[np.float32],
        slots: Sequence[int],
        positions: Sequence[int],
    ) -> TickResult:
        """See `Backend.tick`."""
        n = len(series)
        hours = self._cache.begin_tick(list(slots), list(positions), self.max_rows)
        v = self._model.encode_hours(
            self._filled(series), self._filled(events), None, hours, self._cache
        )
        outputs = self._model.predict(v)
        return TickResult(
            raw={task: out[:n, 0].numpy().copy() for task, out in outputs.items()},
            hidden=v[:n, 0].numpy().copy(),
        )

    def verify_rows(self) -> None:
        """Check on this very machine that a row does not depend on its neighbours, place or slot.

        Two hours of as many stays as fill a tick, together and one by one in other slots. Raises
        RowDependenceError. Overwrites slots: call before they are used.
        """
        config = self._model.config
        rng = np.random.default_rng(0)
        n = min(self.max_rows, self.n_slots)
        series = rng.standard_normal((2, n, config.n_series)).astype(np.float32)
        events = rng.standard_normal((2, n, config.n_event_channels)).astype(np.float32)
        together = [
            self.tick(series[hour], events[hour], range(n), [hour] * n).hidden for hour in (0, 1)
        ]
        for i in range(n):
            for hour in (0, 1):
                one = slice(i, i + 1)
                alone = self.tick(series[hour, one], events[hour, one], [n - 1 - i], [hour]).hidden
                if not np.array_equal(alone[0], together[hour][i]):
                    raise RowDependenceError(
                        "on this machine a row's result depends on the rows beside it; "
                        "set LLM4EHR_ENGINE_ROWS=1"
                    )

    def _filled(self, rows: NDArray[np.float32]) -> torch.Tensor:
        out = torch.zeros(self.max_rows, 1, rows.shape[1])
        out[: len(rows), 0] = torch.from_numpy(rows)
        return out


def kv_shape(network: Network) -> dict[str, int]:
    """Layers, key-value heads and head size of the backbone."""
    layers, heads, size = key_value_shape(network.model.backbone)
    return {"n_layers": layers, "n_kv_heads": heads, "head_dim": size}


def slots_for(network: Network, memory_bytes: int) -> int:
    """How many slots fit into a memory budget; at least one."""
    prompt = network.model.prompt
    positions = network.preprocessing.max_hours + (prompt.length if prompt else 0)
    per_slot = 2 * 4 * positions * math.prod(key_value_shape(network.model.backbone))
    return max(memory_bytes // per_slot, 1)
