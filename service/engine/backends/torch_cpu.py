"""Ticks in PyTorch on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm4ehr.bundle import Network
from llm4ehr.model import ModelConfig
from service.engine.backends.base import DeviceFault, OutOfMemory, TickResult
from service.engine.backends.linear import Precision, pack_linears
from service.engine.backends.recorded import Pass, recorded
from service.engine.backends.shapes import before_hours, before_tokens, kv_shape, token_positions
from service.engine.backends.slot_attention import ATTENTION, WITHOUT_DISPATCH, SlotCache
from service.engine.backends.slot_kernel import slot_library


class TorchCpuBackend:
    """Every tick has one of a few numbers of rows, real ones first, so that the maths library sees
    the same shapes again and again: many of its kernels round differently for a few rows than for
    many. `tick_sizes` is the largest alone until `agreeing_sizes` has said which others agree.
    """

    name = "torch-cpu"
    chained = True

    def __init__(
        self, network: Network, *, n_slots: int, max_rows: int, precision: Precision = "fp32"
    ) -> None:
        if reason := network.not_online:
            raise ValueError(reason)
        self._network = network
        self.n_slots = n_slots
        self.tick_sizes: tuple[int, ...] = (max_rows,)
        self._library = slot_library()
        # A copy: the attention implementation is a property of the backbone's config.
        self._model = copy.deepcopy(network.model).eval()
        self._before = before_hours(self._model), before_tokens(self._model)
        self._model.backbone.model.set_attn_implementation(ATTENTION)
        pack_linears(self._model.backbone, precision)
        self._caches: list[SlotCache] = []
        self._allocate()

    @property
    def config(self) -> ModelConfig:
        """Of the network."""
        return self._network.model.config

    @property
    def kernel(self) -> str:
        """Which attention serves: "compiled" or "reference"."""
        return "reference" if self._library is None else "compiled"

    @torch.inference_mode()
    def tick(
        self,
        series: NDArray[np.float32],
        events: NDArray[np.float32],
        slots: Sequence[int],
        hours: Sequence[int],
        latest: NDArray[np.float32] | None = None,
    ) -> TickResult:
        """See `Backend.tick`. Raises ValueError for rows outside the slots."""
        n, size = len(series), self._size(len(series))
        with _memory():
            at = self._caches[0].begin_tick(slots, hours, size)
            inputs = [_filled(series, size), _filled(events, size), at]
            if self.config.events == "stream":
                if latest is None:
                    raise ValueError("heads read the latest token beside the hour: give `latest`")
                inputs.append(_filled(latest, size))
            states, *outputs = self._run(self._hours, size, inputs)
        return TickResult(
            raw={
                task: out[:n, 0].numpy().copy()
                for task, out in zip(self.config.heads, outputs, strict=True)
            },
            hidden=states[:n, 0].numpy().copy(),
        )

    @torch.inference_mode()
    def tick_tokens(
        self, ids: NDArray[np.int64], slots: Sequence[int], positions: Sequence[int]
    ) -> NDArray[np.float32]:
        """See `Backend.tick_tokens`. Raises ValueError for a network without an event pass."""
        if self.config.events != "stream":
            raise ValueError("this network reads no second stream of events")
        n, size = len(ids), self._size(len(ids))
        with _memory():
            at = self._caches[1].begin_tick(slots, positions, size)
            filled = torch.zeros(size, 1, dtype=torch.long)
            filled[:n, 0] = torch.from_numpy(ids)
            (z,) = self._run(self._event_pass, size, [filled, at])
        states: NDArray[np.float32] = z[:n, 0].numpy().copy()
        return states

    def shrink(self) -> bool:
        """See `Backend.shrink`."""
        if self.n_slots < 2:
            return False
        self.n_slots //= 2
        try:
            self._allocate()
        except OutOfMemory as error:
            raise DeviceFault("no memory for half of the slots") from error
        return True

    # --- one pass ----------------------------------------------------------------------------

    def _hours(
        self, series: Tensor, events: Tensor, hours: Tensor, *latest: Tensor
    ) -> tuple[Tensor, ...]:
        """States of the rows, then the outputs of each head."""
        v = self._model.encode_hours(series, events, None, hours, self._caches[0])
        states = torch.cat([v, *latest], dim=-1) if latest else v
        return (states, *self._model.predict(states).values())

    def _event_pass(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """z of the rows."""
        cache = self._caches[1]
        embeds = self._model.tokens(ids)
        return (self._model.backbone(embeds, None, positions + cache.n_first, cache),)

    def _run(self, run: Pass, size: int, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """A pass over `size` rows: recorded the first time, repeated from then on."""
        key = run.__name__, size
        if key not in self._passes:
            self._passes[key] = recorded(run, inputs, WITHOUT_DISPATCH)
        return self._passes[key](*inputs)

    # --- memory ------------------------------------------------------------------------------

    def _allocate(self) -> None:
        """Slots of the hours, and of the event pass if there is one. Old ones are freed first."""
        self._passes: dict[tuple[str, int], Pass] = {}
        self._caches.clear()
        positions = [self._network.preprocessing.max_hours]
        if self.config.events == "stream":
            positions.append(token_positions(self._network))
        with _memory():
            for n, first in zip(positions, self._before, strict=False):
                self._caches.append(
                    SlotCache(
                        **kv_shape(self._network),
                        n_slots=self.n_slots,
                        hours=n,
                        first=first,
                        library=self._library,
                    )
                )

    def _size(self, n_rows: int) -> int:
        return next(size for size in self.tick_sizes if size >= n_rows)


def _filled(rows: NDArray[np.float32], size: int) -> Tensor:
    """[R, n] -> [size, 1, n], zeros in the rows that only fill up."""
    out = torch.zeros(size, 1, rows.shape[1])
    out[: len(rows), 0] = torch.from_numpy(rows)
    return out


@contextmanager
def _memory() -> Iterator[None]:
    """Turns what torch says when it cannot allocate into OutOfMemory."""
    try:
        yield
    except MemoryError as error:
        raise OutOfMemory("no memory") from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise OutOfMemory("no memory") from error
