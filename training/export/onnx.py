"""A network as ONNX graphs for other runtimes, in fp32.

The graphs hold what the network computes: from features to raw head outputs and states. Making
features (`llm4ehr.episode.featurise`) and turning raw outputs into answers (`llm4ehr.calibration`)
stay outside.

Shape legend: B stays, T hours, P hours of the past, N tokens or length of the prompt, S series
features, E event channels, L layers, K keys and values, G key-value heads, D head size.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers.cache_utils import Cache

from llm4ehr.bundle import Network
from llm4ehr.model import LLM4EHR
from llm4ehr.prompts import key_value_shape
from training.export.graphs import WEIGHTS_FILE, Graph, graphs_of

# Weights from this size on lie in the weights file, each at a multiple of it, so that a runtime can
# map them into memory. Both graphs have the same weights, which are stored once.
_PAGE = 4096


def require_onnx() -> None:
    """Raise ValueError that says what to install unless everything for ONNX is there."""
    needed = ("onnx", "onnxruntime", "onnxscript")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise ValueError(
            f"{', '.join(missing)} not installed: ONNX graphs need `pip install 'llm4ehr[onnx]'`; "
            "--no-onnx exports without them"
        )


def write_graphs(network: Network, folder: Path) -> list[Graph]:
    """Write the ONNX graphs of a network and their weights into a folder that exists."""
    import onnx_ir

    graphs = graphs_of(network)
    model = network.model.eval().cpu()
    window = model.config.backbone.window
    # With more hours than the window the band of a Longformer is in the graph.
    hours = 5 if window is None or network.preprocessing.max_hours <= window + 1 else window + 3
    made = [_exported(model, graph, hours) for graph in graphs]
    _share_weights(made, folder / WEIGHTS_FILE)
    for graph, exported in zip(graphs, made, strict=True):
        onnx_ir.save(exported, folder / graph.file)
    return graphs


class _Sequence(nn.Module):
    """All hours of whole stays: the inputs of the graph in order -> heads and states."""

    def __init__(self, model: LLM4EHR, graph: Graph) -> None:
        super().__init__()
        self.model = model
        self.names = [port.name for port in graph.inputs]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.names, inputs, strict=True))
        series_BTS, mask_BT = given["series"], given["hour_mask"]
        if self.model.config.events == "stream":
            # Filled up beyond one window, so that chunks are read whatever the number of tokens.
            fill = (0, self.model.config.event_window or 0)
            ids_BN = nn.functional.pad(given["token_ids"], fill)
            hours_BN = nn.functional.pad(given["token_hours"], fill, value=-1)
            states = self.model.encode_stay(
                series_BTS, None, mask_BT, ids_BN, hours_BN, hours_BN >= 0
            )
        else:
            hours_BT = torch.arange(series_BTS.shape[1]).expand(series_BTS.shape[:2])
            states = self.model.encode_hours(series_BTS, given.get("events"), mask_BT, hours_BT)
        return (*self.model.predict(states).values(), states)


class _Step(nn.Module):
    """One new hour of each stay: the inputs of the graph in order -> heads, states and new K, V."""

    def __init__(self, model: LLM4EHR, graph: Graph) -> None:
        super().__init__()
        self.model = model
        self.names = [port.name for port in graph.inputs]
        # A prompt is the same for all stays: it becomes a part of the graph.
        layers, kv_heads, head_size = key_value_shape(model.backbone)
        prompt = torch.zeros(layers, 2, kv_heads, 0, head_size)
        if model.prompt is not None:
            before = model.prompt.key_values(model.backbone)
            prompt = torch.stack([torch.stack(list(layer)) for layer in before]).detach()
        self.prompt_LKGND: Tensor
        self.register_buffer("prompt_LKGND", prompt)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.names, inputs, strict=True))
        hour_B1, events_BE, past = given["hour"], given.get("events"), given["past_kv"]
        n_prompt = self.prompt_LKGND.shape[3]
        known_BP = torch.arange(past.shape[4])[None] < hour_B1
        always_BN = torch.ones_like(hour_B1, dtype=torch.bool).expand(-1, n_prompt)
        if n_prompt:
            past = torch.cat([self.prompt_LKGND.expand(len(past), -1, -1, -1, -1, -1), past], dim=4)
        cache = _PastCache(past)
        states = self.model.encode_hours(
            given["series"][:, None],
            None if events_BE is None else events_BE[:, None],
            torch.cat([always_BN, known_BP, torch.ones_like(hour_B1, dtype=torch.bool)], dim=1),
            hour_B1,
            cache,
        )[:, 0]
        return (*self.model.predict(states).values(), states, cache.new_kv())


class _PastCache(Cache):
    """Keys and values that came from outside, [B, L, 2, G, P, D]; keeps the new ones apart."""

    def __init__(self, past: Tensor) -> None:
        super().__init__(layers=[])
        self.past = past
        self.new: dict[int, Tensor] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Past and new keys and values of a layer, [B, G, P + 1, D]."""
        self.new[layer_idx] = torch.stack([key_states, value_states], dim=1)
        past_keys, past_values = self.past[:, layer_idx].unbind(1)
        return torch.cat([past_keys, key_states], 2), torch.cat([past_values, value_states], 2)

    def new_kv(self) -> Tensor:
        """What the last forward added: [B, L, 2, G, 1, D]."""
        return torch.stack([self.new[layer] for layer in range(len(self.new))], dim=1)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """P."""
        return self.past.shape[4]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length of the keys that the attention mask spans, and where they begin."""
        return self.past.shape[4] + query_length, 0


def _exported(model: LLM4EHR, graph: Graph, n_hours: int) -> Any:
    """The graph of a model in memory, as onnx_ir.Model."""
    import onnx_ir

    wrapper = (_Sequence if graph.kind == "sequence" else _Step)(model, graph).eval()
    # Sizes of the example: different, for equal ones could be taken to be tied, and none is 1.
    sizes = {"batch": 3, "hours": n_hours, "past": 6, "tokens": 7}
    example, dynamic = [], []
    for port in graph.inputs:
        shape = [sizes[d] if isinstance(d, str) else d for d in port.shape]
        example.append(torch.zeros(shape, dtype=getattr(torch, port.dtype)))
        free = [i for i, d in enumerate(port.shape) if isinstance(d, str)]
        dynamic.append(dict.fromkeys(free, Dim.DYNAMIC))
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            wrapper,
            tuple(example),
            dynamo=True,
            dynamic_shapes=(tuple(dynamic),),
            input_names=[port.name for port in graph.inputs],
            output_names=[port.name for port in graph.outputs],
            custom_translation_table={torch.ops.aten.cummax.default: _cummax},
            verbose=False,
        )
    assert program is not None
    # Where on this machine the code lies is no part of the model.
    for node in program.model.graph:
        node.doc_string = None
        node.metadata_props.clear()
    graph_io = (*program.model.graph.inputs, *program.model.graph.outputs)
    for value, port in zip(graph_io, (*graph.inputs, *graph.outputs), strict=True):
        value.shape = onnx_ir.Shape(port.shape)
    return program.model


def _cummax(x_BT: Any, dim: int) -> tuple[Any, Any]:
    """Running maximum of each row, which ONNX has no operator for: over all pairs of hours."""
    from onnxscript import opset18

    op: Any = opset18
    steps = op.Range(0, op.Squeeze(op.Shape(x_BT, start=1, end=2)), 1)
    until = op.LessOrEqual(op.Unsqueeze(steps, [0]), op.Unsqueeze(steps, [1]))
    lowest = op.ReduceMin(x_BT, keepdims=1)
    seen_BTT = op.Where(until, op.Unsqueeze(x_BT, [1]), op.Unsqueeze(lowest, [1]))
    return op.ReduceMax(seen_BTT, [2], keepdims=0), op.ArgMax(seen_BTT, axis=2, keepdims=0)


def _share_weights(models: Sequence[Any], file: Path) -> None:
    """Move the weights of models out of them into one file; what is equal is written once."""
    import onnx_ir

    offsets: dict[bytes, int] = {}
    with file.open("wb") as out:
        for model in models:
            for name, value in model.graph.initializers.items():
                tensor = value.const_value
                if tensor.nbytes < _PAGE:
                    continue
                content = tensor.tobytes()
                key = hashlib.sha256(content).digest()
                if key not in offsets:
                    out.write(bytes(-out.tell() % _PAGE))
                    offsets[key] = out.tell()
                    out.write(content)
                value.const_value = onnx_ir.ExternalTensor(
                    file.name,
                    offsets[key],
                    len(content),
                    tensor.dtype,
                    shape=tensor.shape,
                    name=name,
                    base_dir=file.parent,
                )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of itself: operators of packages that are not needed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
