"""Ticks in PyTorch on a CUDA device: replays of CUDA graphs, one for each tick size.

A tick copies its rows to the device, replays, copies the answers back and waits once, for the event
behind all of it. The same class runs on the CPU without graphs, which tests its logic.

Shape legend: R rows, S series features, E event channels, H hidden.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm4ehr.bundle import Network
from llm4ehr.model import ModelConfig
from llm4ehr.prompts import KeyValues, key_value_shape
from service.engine.backends.base import DeviceFault, OutOfMemory, TickResult
from service.engine.backends.device_slots import ATTENTION, DeviceSlotCache, attention_for
from service.engine.backends.shapes import before_hours, before_tokens, token_positions
from service.engine.backends.transfer import Mirror, device_errors

Pass = Literal["hours", "tokens"]
_WARM_UPS = 3


class TorchCudaBackend:
    """See `Backend`. Raises ValueError for a network that cannot be streamed and for a device that
    is not there, OutOfMemory, DeviceFault.

    For another number of rows the maths library may choose another kernel: `tick_sizes` is the
    largest alone until `agreeing_sizes` has said which others agree.
    """

    name = "torch-cuda"
    chained = True

    def __init__(
        self, network: Network, *, n_slots: int, max_rows: int, device: str = "cuda"
    ) -> None:
        if reason := network.not_online:
            raise ValueError(reason)
        self._device = _device(device)
        self._network = network
        config = network.model.config
        self._fused, self._reads_tokens = config.events == "fused", config.events == "stream"
        self.n_slots = n_slots
        self.tick_sizes: tuple[int, ...] = (max_rows,)
        with device_errors():
            # A copy: the attention implementation is a property of the backbone's config.
            model = copy.deepcopy(network.model).eval()
            self._before: dict[Pass, KeyValues] = {"hours": before_hours(model)}
            if self._reads_tokens:
                self._before["tokens"] = before_tokens(model)
            model.backbone.model.set_attn_implementation(ATTENTION)
            self._model = model.requires_grad_(False).to(self._device)
            self._cuda = _Graphs(self._device) if self._device.type == "cuda" else None
        # Also what is filled with zeros belongs to the stream that will use it.
        with device_errors(), self._on_stream():
            self._attend = attention_for(self._device)
            hidden = model.backbone.hidden_size
            self._widths = dict(config.heads)
            given = (config.n_series, config.n_event_channels * self._fused)
            self._given = (*given, hidden * self._reads_tokens)
            # Series, events and latest token of each row beside each other: one copy.
            self._inputs = self._mirror(max_rows, sum(self._given))
            self._ids = self._mirror(max_rows, dtype=torch.int64)
            self._places = self._mirror(2, max_rows, dtype=torch.int64)  # slots, positions
            self._results = {
                "hours": self._mirror(max_rows, sum(self._widths.values()) + model.state_size),
                "tokens": self._mirror(max_rows, hidden),
            }
        self._allocate()

    @property
    def config(self) -> ModelConfig:
        """Of the network."""
        return self._network.model.config

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
        if self._reads_tokens and latest is None:
            raise ValueError("heads read the latest token beside the hour: give `latest`")
        start = 0
        for rows, width in zip((series, events, latest), self._given, strict=True):
            if width and rows is not None:
                self._inputs.array[:n, start : start + width] = rows
            start += width
        self._inputs.array[n:size] = 0
        out = self._compute("hours", size, slots, hours)
        raw, column = {}, 0
        for task, width in self._widths.items():
            raw[task] = out[:n, column : column + width].copy()
            column += width
        return TickResult(raw=raw, hidden=out[:n, column:].copy())

    def tick_tokens(
        self, ids: NDArray[np.int64], slots: Sequence[int], positions: Sequence[int]
    ) -> NDArray[np.float32]:
        """See `Backend.tick_tokens`. Raises ValueError for a network without an event pass."""
        if not self._reads_tokens:
            raise ValueError("this network reads no second stream of events")
        n, size = len(ids), self._size(len(ids))
        self._ids.array[:n], self._ids.array[n:size] = ids, 0
        return self._compute("tokens", size, slots, positions)[:n].copy()

    def shrink(self) -> bool:
        """See `Backend.shrink`."""
        while self.n_slots > 1:
            self.n_slots //= 2
            try:
                self._allocate()
            except OutOfMemory:
                continue
            return True
        if not self._steps:
            raise DeviceFault("the device has no memory for a single slot")
        return False

    # --- one tick ----------------------------------------------------------------------------

    def _compute(
        self, kind: Pass, size: int, slots: Sequence[int], positions: Sequence[int]
    ) -> NDArray[np.float32]:
        n, places = len(slots), self._places.array
        with device_errors(), torch.inference_mode(), self._on_stream():
            if (kind, size) not in self._steps:
                self._add_step(kind, size)
            places[0, :n], places[1, :n] = slots, positions
            # A place outside the pool would break the device for the whole process.
            if (places[:, :n] < 0).any() or (places[:, :n] >= self._ends[kind]).any():
                raise ValueError("a row outside the slots")
            places[0, n:size], places[1, n:size] = self.n_slots, 0
            self._launch(kind, size)
            if self._cuda is not None:
                self._cuda.done.synchronize()
        return self._results[kind].array

    def _launch(self, kind: Pass, size: int) -> None:
        """Everything between writing the rows and waiting for the answers; waits for nothing."""
        (self._inputs if kind == "hours" else self._ids).push(size)
        self._places.push(2)
        self._results[kind].pull(self._steps[kind, size]())
        if self._cuda is not None:
            self._cuda.done.record(self._cuda.stream)

    def _hours(self, size: int) -> Tensor:
        """Rows in the buffers of the device -> raw outputs and states beside each other."""
        series, events, latest = torch.split(self._inputs.device[:size], list(self._given), dim=1)
        slots, hours = self._places.device[:, :size]
        cache = self._caches["hours"]
        cache.begin_tick(slots, hours)
        of_events = events[:, None] if self._fused else None
        model = self._model
        states = model.encode_hours(series[:, None], of_events, None, hours[:, None], cache)[:, 0]
        if self._reads_tokens:
            states = torch.cat([states, latest], dim=1)
        return torch.cat([*model.predict(states).values(), states], dim=1)

    def _tokens(self, size: int) -> Tensor:
        """The same for the event pass: z [R, H]."""
        slots, positions = self._places.device[:, :size]
        cache = self._caches["tokens"]
        cache.begin_tick(slots, positions)
        embeds = self._model.tokens(self._ids.device[:size])[:, None]
        at = (positions + cache.first)[:, None]
        z: Tensor = self._model.backbone(embeds, None, at, cache)
        return z[:, 0]

    # --- memory ------------------------------------------------------------------------------

    def _allocate(self) -> None:
        """Slots, and the passes of every tick size over them. What was there before is freed."""
        self._steps: dict[tuple[Pass, int], Callable[[], Tensor]] = {}
        self._caches: dict[Pass, DeviceSlotCache] = {}
        lengths: dict[Pass, int] = {
            "hours": self._network.preprocessing.max_hours,
            "tokens": token_positions(self._network),
        }
        self._ends = {kind: np.array([[self.n_slots], [n]]) for kind, n in lengths.items()}
        with device_errors(), self._on_stream():
            if self._cuda is not None:
                self._cuda.forget()
            for kind, before in self._before.items():
                self._caches[kind] = DeviceSlotCache(
                    key_value_shape(self._model.backbone),
                    self.n_slots,
                    lengths[kind],
                    self._device,
                    self._attend,
                    [(k.to(self._device), v.to(self._device)) for k, v in before],
                )
            with torch.inference_mode():
                for kind in self._caches:
                    for size in reversed(self.tick_sizes):
                        self._add_step(kind, size)

    def _add_step(self, kind: Pass, size: int) -> None:
        """The pass for one tick size; as a graph on CUDA."""
        run = self._hours if kind == "hours" else self._tokens
        if self._cuda is None:
            self._steps[kind, size] = lambda: run(size)
            return
        # It runs a few times before it is captured: on rows that nobody reads.
        self._places.array[0], self._places.array[1] = self.n_slots, 0
        self._places.push(2)
        self._steps[kind, size] = self._cuda.captured(lambda: run(size))

    def _size(self, n_rows: int) -> int:
        return next(size for size in self.tick_sizes if size >= n_rows)

    def _mirror(self, *shape: int, dtype: torch.dtype = torch.float32) -> Mirror:
        return Mirror(*shape, dtype=dtype, device=self._device)

    def _on_stream(self) -> torch.cuda.StreamContext:
        return torch.cuda.stream(self._cuda.stream if self._cuda else None)


class _Graphs:
    """A stream of its own, the graphs that are replayed on it, and the event behind a tick."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.forget()

    def forget(self) -> None:
        """Free what is held for graphs; the caller has dropped them."""
        torch.cuda.empty_cache()
        # Graphs run one after the other and their results are copied out in between, so that all
        # may use the same memory.
        self._memory = torch.cuda.graph_pool_handle()

    def captured(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """`run` as a graph: a call replays it and gives the tensor that it writes."""
        for _ in range(_WARM_UPS):
            run()
        graph = torch.cuda.CUDAGraph()
        # Other threads go on meanwhile: an engine that serves another version on this device.
        with torch.cuda.graph(
            graph, pool=self._memory, stream=self.stream, capture_error_mode="thread_local"
        ):
            out = run()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


def _device(name: str) -> torch.device:
    """The device, set up for sums that are the same every time. Raises ValueError."""
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                "torch finds no CUDA device: install a driver and torch with CUDA, or set "
                "LLM4EHR_BACKEND=torch-cpu"
            )
        # Read when cuBLAS is first used. Without it sums may depend on what ran before.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cuda.matmul.fp32_precision = "ieee"  # no TF32
        if name == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
    return device
