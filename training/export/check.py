"""Whether ONNX graphs answer as their network: onnxruntime on the CPU against torch.

Shape legend: B stays, T hours, P hours of the past, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from llm4ehr.bundle import Network
from llm4ehr.calibration import Calibration
from llm4ehr.episode import Episode, event_tokens, featurise
from llm4ehr.offline import TOLERANCE, score_episodes
from training.export.graphs import Graph, Port

Arrays: TypeAlias = dict[Any, NDArray[Any]]  # by the name of a port; tasks are such names
# Stays and hours of the random inputs.
_SHAPES = ((1, 1), (2, 7), (5, 48))
_STAYS_AT_ONCE = 8


class GraphError(ValueError):
    """An ONNX graph does not answer as the network does."""


@dataclass(slots=True)
class Difference:
    """Largest absolute differences; NaN once anything was NaN."""

    probability: float = 0.0
    hidden: float = 0.0
    hours: float = 0.0  # of remaining stay

    def add(self, wanted: Arrays, got: Arrays, calibration: Calibration) -> None:
        """Take in raw outputs and states of the same rows."""
        self._widen("hidden", wanted["state"], got["state"])
        for task, answer in calibration.items():
            kind: Literal["hours", "probability"]
            kind = "hours" if task == "remaining_los" else "probability"
            some_hour = np.zeros(1, np.int64)
            self._widen(kind, answer(wanted[task], some_hour), answer(got[task], some_hour))

    def _widen(self, kind: str, wanted: NDArray[Any], got: NDArray[Any]) -> None:
        apart = np.abs(wanted.astype(np.float64) - got.astype(np.float64))
        setattr(self, kind, float(np.max(apart, initial=getattr(self, kind))))

    @property
    def tolerable(self) -> bool:
        """Whether all are within `TOLERANCE`."""
        allowed = asdict(TOLERANCE)
        return all(value <= allowed[kind] for kind, value in asdict(self).items())


def check_graphs(
    network: Network,
    graphs: Sequence[Graph],
    folder: Path,
    episodes: Sequence[Episode],
    calibration: Calibration,
) -> dict[str, Any]:
    """Largest differences of every graph on random inputs and on whole stays: file -> of what.

    `calibration` should be one without fitted parameters, which would stretch the differences.
    The step graph goes through every stay hour by hour, stays at different hours in one call.
    Raises GraphError when a difference is above `llm4ehr.offline.TOLERANCE`.
    """
    rng = np.random.default_rng(0)
    report: dict[str, Any] = {}
    for graph in graphs:
        session = _session(folder / graph.file)
        answered = _in_steps if graph.kind == "step" else _at_once
        found = {"random inputs": Difference()}
        if episodes:
            found["stays"] = Difference()
        for n_stays, n_hours in _SHAPES:
            n_hours = min(n_hours, network.preprocessing.max_hours)
            inputs, lengths = _random_inputs(network, rng, n_stays, n_hours)
            for wanted, got in zip(
                _torch(network, inputs, lengths),
                answered(session, graph, inputs, lengths),
                strict=True,
            ):
                found["random inputs"].add(wanted, got, calibration)
        for start in range(0, len(episodes), _STAYS_AT_ONCE):
            batch = episodes[start : start + _STAYS_AT_ONCE]
            inputs, lengths = _inputs_of(network, batch)
            scored = score_episodes(network, batch)
            for scores, got in zip(scored, answered(session, graph, inputs, lengths), strict=True):
                found["stays"].add({**scores.raw, "state": scores.hidden}, got, calibration)
        report[graph.file] = {where: asdict(difference) for where, difference in found.items()}
        for where, difference in found.items():
            if not difference.tolerable:
                raise GraphError(
                    f"{graph.file}: differs from torch on {where} by {asdict(difference)}, "
                    f"allowed are {asdict(TOLERANCE)}; nothing was exported"
                )
    return report


def _session(file: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def _random_inputs(
    network: Network, rng: np.random.Generator, n_stays: int, n_hours: int
) -> tuple[Arrays, NDArray[np.int64]]:
    config = network.model.config
    lengths = rng.integers(1, n_hours, n_stays, endpoint=True)
    lengths[0] = n_hours
    n_tokens = 2 * n_hours
    inputs: Arrays = {
        "series": rng.normal(size=(n_stays, n_hours, config.n_series)).astype(np.float32),
        "events": rng.normal(size=(n_stays, n_hours, config.n_event_channels)).astype(np.float32),
        "token_ids": rng.integers(0, config.n_tokens, (n_stays, n_tokens)),
        "token_hours": np.sort(rng.integers(0, n_hours, (n_stays, n_tokens)), axis=1),
    }
    inputs["hour_mask"] = _mask(lengths, n_hours)
    return inputs, lengths


def _inputs_of(network: Network, episodes: Sequence[Episode]) -> tuple[Arrays, NDArray[np.int64]]:
    preprocessing, vocabulary = network.preprocessing, network.vocabulary
    features = [featurise(e, vocabulary, preprocessing, e.n_hours) for e in episodes]
    lengths = np.array([len(f.series) for f in features])
    tokens = [
        event_tokens(e, vocabulary, int(n), preprocessing)
        for e, n in zip(episodes, lengths, strict=True)
    ]
    most = network.model.max_tokens
    inputs: Arrays = {
        "series": _padded([f.series for f in features]),
        "events": _padded([f.events for f in features]),
        "token_ids": _padded([t.ids[:most].astype(np.int64) for t in tokens]),
        "token_hours": _padded([t.hours[:most].astype(np.int64) for t in tokens], fill=-1),
    }
    inputs["hour_mask"] = _mask(lengths, int(lengths.max()))
    return inputs, lengths


def _mask(lengths: NDArray[np.int64], n_hours: int) -> NDArray[np.bool_]:
    return np.arange(n_hours) < lengths[:, None]


def _padded(arrays: Sequence[NDArray[Any]], fill: int = 0) -> NDArray[Any]:
    longest = max(1, *(len(a) for a in arrays))
    out = np.full((len(arrays), longest, *arrays[0].shape[1:]), fill, arrays[0].dtype)
    for row, array in enumerate(arrays):
        out[row, : len(array)] = array
    return out


@torch.inference_mode()
def _torch(network: Network, inputs: Arrays, lengths: NDArray[np.int64]) -> list[Arrays]:
    given = {name: torch.from_numpy(array) for name, array in inputs.items()}
    ids, hours = given["token_ids"], given["token_hours"]
    states = network.model.encode_stay(
        given["series"], given["events"], given["hour_mask"], ids, hours, hours >= 0
    )
    outputs: dict[Any, torch.Tensor] = {**network.model.predict(states), "state": states}
    arrays: Arrays = {name: out.numpy() for name, out in outputs.items()}
    return _by_stay(arrays, lengths)


def _at_once(
    session: Any, graph: Graph, inputs: Arrays, lengths: NDArray[np.int64]
) -> list[Arrays]:
    """Outputs of the sequence graph, cut to the stays."""
    names = [port.name for port in graph.outputs]
    outputs = session.run(names, {port.name: inputs[port.name] for port in graph.inputs})
    return _by_stay(dict(zip(names, outputs, strict=True)), lengths)


def _in_steps(
    session: Any, graph: Graph, inputs: Arrays, lengths: NDArray[np.int64]
) -> list[Arrays]:
    """Outputs of the step graph, hour by hour. Stay b begins at tick b, so that the stays of a call
    have pasts of different lengths; what lies behind the past of a stay is full of junk."""
    ports = {port.name: port for port in (*graph.inputs, *graph.outputs)}
    n_stays, n_hours = inputs["series"].shape[:2]
    *before, size = _fixed(ports["past_kv"])
    past = np.full((n_stays, *before, n_hours, size), 1e3, np.float32)
    names = [port.name for port in graph.outputs]
    answers = {
        name: np.zeros((n_stays, n_hours, *_fixed(ports[name])), np.float32) for name in names[:-1]
    }
    for tick in range(int((lengths + np.arange(n_stays)).max())):
        hour = tick - np.arange(n_stays)
        stays = np.flatnonzero((hour >= 0) & (hour < lengths))
        hour = hour[stays]
        if not len(stays):
            continue
        feeds: Arrays = {"hour": hour[:, None], "past_kv": past[stays][..., : hour.max(), :]}
        for name in ("series", "events"):
            if name in ports:
                feeds[name] = inputs[name][stays, hour]
        outputs = dict(zip(names, session.run(names, feeds), strict=True))
        past[stays, :, :, :, hour] = outputs.pop("new_kv")[..., 0, :]
        for name, out in outputs.items():
            answers[name][stays, hour] = out
    return _by_stay(answers, lengths)


def _fixed(port: Port) -> list[int]:
    return [d for d in port.shape if isinstance(d, int)]


def _by_stay(outputs: Arrays, lengths: NDArray[np.int64]) -> list[Arrays]:
    return [
        {name: out[row, :length] for name, out in outputs.items()}
        for row, length in enumerate(lengths)
    ]
