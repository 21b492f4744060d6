"""Ticks in ONNX Runtime, on the CPU or a CUDA device, with the step graph of a bundle.

The graph takes the past of each row as one array and gives back what the new hour adds to it. The
slots are a tensor on the device; a tick gathers its rows into a buffer, runs the graph on bound
memory and scatters the new columns. Nothing but inputs and results crosses to the host.

Shape legend: R rows, L layers, G key-value heads, P hours of the past, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm4ehr.bundle import Network
from llm4ehr.model import ModelConfig
from llm4ehr.prompts import key_value_shape
from service.engine.backends.base import DeviceFault, OutOfMemory, TickResult
from service.engine.backends.onnx_session import open_session, runtime_errors, without_waiting
from service.engine.backends.transfer import Mirror, device_errors

_STRIDE = 32  # hours between two lengths of the past
# Larger keys and values, infinite or not a number, belong to a stay whose answers are refused. They
# stay in its slot, and 0 times what is in a column that is not read must be 0 for the next stay.
_LARGEST = 1e18


class OnnxBackend:
    """See `Backend`. `graph` is the file `step.onnx` of the bundle, its weights beside it.

    Raises ValueError where there is no graph, runtime or device, OutOfMemory, DeviceFault.

    Rows of one stay cannot share a tick: the graph reads a past in which they are not.

    A tick reads as many hours of the past as its rows need, in steps of `_STRIDE` counted from the
    longest stay: the graph puts the new hour behind the past, and what a sum of products gives may
    depend on its place in a vector register. `past_lengths` is the longest alone until
    `agreeing_lengths` has said which others agree.
    """

    chained = False

    def __init__(
        self,
        network: Network,
        graph: Path,
        *,
        n_slots: int,
        max_rows: int,
        device: Literal["cpu", "cuda"] = "cpu",
        threads: int = 1,
    ) -> None:
        if reason := network.not_online:
            raise ValueError(reason)
        if network.model.config.events == "stream":
            raise ValueError(
                "there is no ONNX graph for events as a second stream (events: stream); set "
                "LLM4EHR_BACKEND=torch-cpu or torch-cuda"
            )
        self.name = f"onnx-{device}"
        self._network = network
        self.n_slots = n_slots
        self.tick_sizes: tuple[int, ...] = (max_rows,)
        self._max_hours = network.preprocessing.max_hours
        self.past_lengths: tuple[int, ...] = (self._max_hours,)
        config = network.model.config
        layers, heads, size = key_value_shape(network.model.backbone)
        self._columns = layers, 2, heads, size
        self._session, self._stream = open_session(graph, device, threads)
        self._run_options = without_waiting()
        self._device = torch.device(device)
        self._done = torch.cuda.Event() if self._stream else None  # type: ignore[no-untyped-call]
        widths = {task: (n,) for task, n in config.heads.items()} | {
            "state": (network.model.state_size,)
        }
        outputs = widths | {"new_kv": (layers, 2, heads, 1, size)}
        # What is filled with zeros belongs to the stream that will use it.
        with device_errors(), torch.cuda.stream(self._stream):
            self._inputs = {"series": self._mirror(max_rows, config.n_series)}
            if config.events == "fused":
                self._inputs["events"] = self._mirror(max_rows, config.n_event_channels)
            self._places = self._mirror(2, max_rows, dtype=torch.int64)  # slots, hours
            self._past = self._zeros(max_rows * self._max_hours * math.prod(self._columns))
            self._outputs = {name: self._zeros(max_rows, *of) for name, of in outputs.items()}
            self._results = self._mirror(max_rows, sum(n for (n,) in widths.values()))
        self._refuse_another_graph()
        self._bound: dict[tuple[int, int], Any] = {}
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
        n = len(series)
        size = next(size for size in self.tick_sizes if size >= n)
        length = next(length for length in self.past_lengths if length >= max(hours))
        for rows, given in zip(self._inputs.values(), (series, events), strict=False):
            rows.array[:n], rows.array[n:size] = given, 0
        places = self._places.array
        places[0, :n], places[1, :n] = slots, hours
        if (places[:, :n] < 0).any() or (places[:, :n] >= self._ends).any():
            raise ValueError("a row outside the slots")
        places[0, n:size], places[1, n:size] = self.n_slots, 0
        with device_errors(), torch.inference_mode(), torch.cuda.stream(self._stream):
            self._launch(size, length)
            if self._done is not None:
                self._done.synchronize()
        out, raw, column = self._results.array, {}, 0
        for task, width in self.config.heads.items():
            raw[task] = out[:n, column : column + width].copy()
            column += width
        return TickResult(raw=raw, hidden=out[:n, column:].copy())

    def tick_tokens(
        self, ids: NDArray[np.int64], slots: Sequence[int], positions: Sequence[int]
    ) -> NDArray[np.float32]:
        """Raises ValueError: there is no graph of the event pass."""
        raise ValueError("this network reads no second stream of events")

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

    def agreeing_lengths(self) -> tuple[int, ...]:
        """Lengths of the past, rising, in which every row has the bits of the longest.

        Tried in all tick sizes on random rows at all hours of each length. Overwrites slots: call
        before they are used. Leaves `past_lengths` at the longest.
        """
        rng = np.random.default_rng(0)
        longest, before = self._max_hours, self.past_lengths
        self._pool.copy_(torch.from_numpy(rng.standard_normal(self._pool.shape, np.float32)))
        agreeing = [longest]
        for length in range(longest - _STRIDE, 0, -_STRIDE):
            for size in self.tick_sizes:
                n = min(size, self.n_slots)
                rows = [
                    rng.standard_normal((n, width), np.float32)
                    for width in (self.config.n_series, self.config.n_event_channels)
                ]
                hours = rng.integers(0, length + 1, n).tolist()
                hours[0] = length
                got = []
                for self.past_lengths in ((length,), (longest,)):
                    result = self.tick(rows[0], rows[1], range(n), hours)
                    got.append([a.tobytes() for a in (result.hidden, *result.raw.values())])
                if got[0] != got[1]:
                    break
            else:
                agreeing.append(length)
        self.past_lengths = before
        return tuple(reversed(agreeing))

    # --- one tick ----------------------------------------------------------------------------

    def _launch(self, size: int, length: int) -> None:
        """Everything between writing the rows and waiting for the answers."""
        for rows in (*self._inputs.values(), self._places):
            rows.push(2 if rows is self._places else size)
        slots, hours = self._places.device[:, :size]
        past, binding = self._binding(size, length)
        torch.index_select(self._pool[..., :length, :], 0, slots, out=past)
        with runtime_errors():
            self._session.run_with_iobinding(binding, self._run_options)
        *answers, new_kv = (out[:size] for out in self._outputs.values())
        new = new_kv[..., 0, :].nan_to_num(0.0).clamp_(-_LARGEST, _LARGEST)
        # Index tensors around slices: rows come first in what they select.
        self._pool[slots, :, :, :, hours] = new
        self._results.pull(torch.cat(answers, dim=1))
        if self._done is not None:
            self._done.record(self._stream)

    def _binding(self, size: int, length: int) -> tuple[Tensor, Any]:
        """The past of ticks of a size and length, and the memory that the graph is bound to."""
        if (size, length) not in self._bound:
            layers, _, heads, width = self._columns
            shape = size, layers, 2, heads, length, width
            past = self._past[: math.prod(shape)].view(shape)
            inputs = {name: rows.device[:size] for name, rows in self._inputs.items()}
            inputs |= {"hour": self._places.device[1, :size, None], "past_kv": past}
            binding = self._session.io_binding()
            for bind, tensors in (
                (binding.bind_input, inputs),
                (binding.bind_output, {name: out[:size] for name, out in self._outputs.items()}),
            ):
                for name, tensor in tensors.items():
                    dtype = np.int64 if tensor.dtype == torch.int64 else np.float32
                    of = self._device.type, self._device.index or 0, dtype
                    bind(name, *of, list(tensor.shape), tensor.data_ptr())
            self._bound[size, length] = past, binding
        past, binding = self._bound[size, length]
        return past, binding

    # --- memory ------------------------------------------------------------------------------

    def _allocate(self) -> None:
        """The slots, and one for rows that nobody reads. What was there before is freed."""
        self._pool = self._zeros(0)
        layers, _, heads, width = self._columns
        with device_errors(), torch.cuda.stream(self._stream):
            if self._stream is not None:
                torch.cuda.empty_cache()
            self._pool = self._zeros(self.n_slots + 1, layers, 2, heads, self._max_hours, width)
        self._ends = np.array([[self.n_slots], [self._max_hours]])

    def _refuse_another_graph(self) -> None:
        names = {port.name for port in self._session.get_inputs()}
        shapes = {port.name: port.shape[1:] for port in self._session.get_outputs()}
        expected = {name: list(out.shape[1:]) for name, out in self._outputs.items()}
        if names != {*self._inputs, "hour", "past_kv"} or shapes != expected:
            raise ValueError("the step graph does not belong to this network")

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self._device)

    def _mirror(self, *shape: int, dtype: torch.dtype = torch.float32) -> Mirror:
        return Mirror(*shape, dtype=dtype, device=self._device)
