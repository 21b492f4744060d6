"""What the ONNX graphs of a network take and give.

`sequence` answers all hours of whole stays at once; `step` answers one new hour of each stay from
the keys and values of its earlier hours.

Shape legend of the names: batch B, hours T, past P, tokens N.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llm4ehr.bundle import Network
from llm4ehr.prompts import key_value_shape

DataType = Literal["float32", "int64", "bool"]
WEIGHTS_FILE = "weights.onnx.data"
GRAPH_FILES = {"sequence": "model.onnx", "step": "step.onnx"}


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output of a graph. Dimensions with a name are free, the first is the batch."""

    name: str
    dtype: DataType
    shape: tuple[str | int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """One ONNX graph of a bundle: `file` holds it, `WEIGHTS_FILE` the weights of all graphs."""

    kind: Literal["sequence", "step"]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    @property
    def file(self) -> str:
        """Name of the file in the folder of the bundle."""
        return GRAPH_FILES[self.kind]


def graphs_of(network: Network) -> list[Graph]:
    """The graphs that can be made of a network: `sequence`, and `step` unless `no_step`."""
    graphs = [_sequence(network)]
    return graphs if no_step(network) else [*graphs, _step(network)]


def no_step(network: Network) -> str | None:
    """Why a network has no graph of a single hour; None if it has."""
    if network.model.config.events == "stream":
        return "this network reads events as a second stream (events: stream) beside the hours"
    return network.not_online


def _sequence(network: Network) -> Graph:
    config = network.model.config
    inputs = [Port("series", "float32", ("batch", "hours", config.n_series))]
    if config.events == "fused":
        inputs.append(Port("events", "float32", ("batch", "hours", config.n_event_channels)))
    inputs.append(Port("hour_mask", "bool", ("batch", "hours")))
    if config.events == "stream":
        # The hour of a token that only fills up a row is -1.
        inputs.append(Port("token_ids", "int64", ("batch", "tokens")))
        inputs.append(Port("token_hours", "int64", ("batch", "tokens")))
    outputs = _answers(network, ("batch", "hours"))
    return Graph(kind="sequence", inputs=tuple(inputs), outputs=outputs)


def _step(network: Network) -> Graph:
    config = network.model.config
    layers, kv_heads, head_size = key_value_shape(network.model.backbone)
    inputs = [Port("series", "float32", ("batch", config.n_series))]
    if config.events == "fused":
        inputs.append(Port("events", "float32", ("batch", config.n_event_channels)))
    # A stay at hour t has t hours behind it, in the first t columns of its past.
    inputs.append(Port("hour", "int64", ("batch", 1)))
    inputs.append(Port("past_kv", "float32", ("batch", layers, 2, kv_heads, "past", head_size)))
    new_kv = Port("new_kv", "float32", ("batch", layers, 2, kv_heads, 1, head_size))
    outputs = (*_answers(network, ("batch",)), new_kv)
    return Graph(kind="step", inputs=tuple(inputs), outputs=outputs)


def _answers(network: Network, rows: tuple[str, ...]) -> tuple[Port, ...]:
    heads = network.model.config.heads
    return (
        *(Port(task, "float32", (*rows, n)) for task, n in heads.items()),
        Port("state", "float32", (*rows, network.model.state_size)),
    )
