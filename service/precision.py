"""Reduced precision: measured on real stays before the service may answer with it.

    python -m service gate --precision bf16 --data STORE --out gate.json

scores the stays of a store through the engine's backend in full and in reduced precision. The file
says how far the answers are apart, and whether that is within the limit. The service asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llm4ehr.bundle import Bundle, Network
from llm4ehr.episode import Episode, EventTokens, event_tokens, featurise
from llm4ehr.model import Task
from llm4ehr.store import EpisodeStore
from service.core import Numerics
from service.engine.backends.base import Backend
from service.engine.backends.shapes import token_positions
from service.engine.backends.torch_cpu import TorchCpuBackend
from service.engine.tokens import TokenRows
from service.settings import Settings

ReducedPrecision = Literal["bf16"]
LIMIT = 1e-2
_ROWS = 32
_Rows = NDArray[np.float32]


class NotGated(ValueError):
    """Nothing says that a reduced precision may answer with this bundle."""


class Change(BaseModel):
    """Absolute change of the answers of a task over all stays, hours and outputs."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    unit: Literal["probability", "hours"]
    max: float
    p999: float
    """99.9 % of the changes are at most so large."""
    mean: float


class Gate(BaseModel):
    """What was measured before a reduced precision may answer."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    bundle: str
    digest: str
    precision: ReducedPrecision
    limit: Annotated[float, Field(gt=0)]
    """Largest change of a probability that is let through."""
    stays: int
    hours: int
    changes: dict[Task, Change]
    passed: bool


def measure(bundle: Bundle, data: Path, precision: ReducedPrecision, limit: float = LIMIT) -> Gate:
    """Score a store in both precisions and compare the answers.

    Only probabilities decide: hours of remaining stay have no scale of their own, and are reported.
    Raises StoreError, and ValueError for a store without hours, an answer that is not finite, or a
    network that cannot be streamed.
    """
    backends = [
        TorchCpuBackend(bundle.network, n_slots=_ROWS, max_rows=_ROWS, precision=p)
        for p in ("fp32", precision)
    ]
    apart: dict[Task, list[NDArray[np.float64]]] = {}
    stays = hours = 0
    for block in EpisodeStore.open(data).blocks():
        episodes = [record.episode for record in block if record.episode.n_hours]
        for i in range(0, len(episodes), _ROWS):
            group = episodes[i : i + _ROWS]
            full, reduced = (_answers(bundle, backend, group) for backend in backends)
            for a, b in zip(full, reduced, strict=True):
                stays, hours = stays + 1, hours + len(next(iter(a.values())))
                for task in a:
                    apart.setdefault(task, []).append(np.abs(a[task] - b[task]).ravel())
    if not hours:
        raise ValueError(f"{data} has no hour to compare")
    changes = {task: _change(task, np.concatenate(parts)) for task, parts in apart.items()}
    probabilities = [c.max for c in changes.values() if c.unit == "probability"]
    return Gate(
        bundle=f"{bundle.name}/{bundle.version}",
        digest=bundle.digest,
        precision=precision,
        limit=limit,
        stays=stays,
        hours=hours,
        changes=changes,
        # Without a probability there is nothing that the limit speaks of.
        passed=bool(probabilities) and max(probabilities) <= limit,
    )


def read_gate(path: Path) -> Gate:
    """What `measure` gave. Raises OSError, ValueError."""
    try:
        return Gate.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{path} is no file of `python -m service gate`") from error


def numerics(backend: Backend, settings: Settings, gate: Mapping[str, Any] | None) -> Numerics:
    """How a backend computes, with what `let_through` returned."""
    return Numerics(
        precision=settings.precision,
        backend=backend.name,
        rows=backend.tick_sizes[-1],
        threads=torch.get_num_threads(),
        kernel=getattr(backend, "kernel", None),
        gate=gate,
    )


def let_through(bundle: Bundle, settings: Settings) -> Mapping[str, Any] | None:
    """Figures of the gate of a reduced precision; None for full precision.

    Raises ValueError; NotGated where a reduced precision was not let through for this very bundle.
    """
    precision = settings.precision
    if precision == "fp32":
        return None
    if settings.backend != "torch-cpu":
        raise ValueError(f"LLM4EHR_PRECISION={precision} needs LLM4EHR_BACKEND=torch-cpu")
    if settings.precision_gate is None:
        raise NotGated(
            f"LLM4EHR_PRECISION={precision} needs LLM4EHR_PRECISION_GATE: measure what it changes "
            f"with `python -m service gate --precision {precision}`"
        )
    gates = _gates(settings.precision_gate)
    gate = next((g for g in gates if (g.digest, g.precision) == (bundle.digest, precision)), None)
    if gate is None:
        measured = ", ".join(f"{g.bundle} in {g.precision}" for g in gates) or "nothing"
        raise NotGated(
            f"LLM4EHR_PRECISION_GATE was measured on {measured}, not on "
            f"this {bundle.name}/{bundle.version} in {precision}"
        )
    if not gate.passed:
        raise NotGated(
            f"LLM4EHR_PRECISION_GATE: {precision} changes answers of {gate.bundle} by more than "
            f"{gate.limit}"
        )
    return gate.model_dump(include={"limit", "stays", "hours", "changes"})


def _gates(path: Path) -> list[Gate]:
    """Of a file, or of all files of a folder. Raises NotGated, in words that name no folder."""
    gates = []
    for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
        try:
            gates.append(read_gate(file))
        except OSError as error:
            raise NotGated(f"LLM4EHR_PRECISION_GATE: {file.name}: {error.strerror}") from error
        except ValueError as error:
            raise NotGated(f"LLM4EHR_PRECISION_GATE: {file.name} is no gate") from error
    return gates


def _change(task: Task, apart: NDArray[np.float64]) -> Change:
    if not np.isfinite(apart).all():
        raise ValueError(f"an answer for {task} is not finite")
    return Change(
        unit="hours" if task == "remaining_los" else "probability",
        max=float(apart.max()),
        p999=float(np.quantile(apart, 0.999)),
        mean=float(apart.mean()),
    )


def _answers(
    bundle: Bundle, backend: TorchCpuBackend, episodes: Sequence[Episode]
) -> list[dict[Task, NDArray[np.float64]]]:
    """Calibrated answers [T, n] of no more stays than there are slots, hour by hour."""
    network = bundle.network
    latest = _latest(network, backend, episodes)
    features = [
        featurise(e, network.vocabulary, network.preprocessing, e.n_hours) for e in episodes
    ]
    raw: list[list[dict[Task, _Rows]]] = [[] for _ in episodes]
    for hour in range(max(len(f.series) for f in features)):
        here = [i for i, f in enumerate(features) if hour < len(f.series)]
        result = backend.tick(
            np.stack([features[i].series[hour] for i in here]),
            np.stack([features[i].events[hour] for i in here]),
            here,
            [hour] * len(here),
            np.stack([latest[i][hour] for i in here]) if latest else None,
        )
        for row, i in enumerate(here):
            raw[i].append({task: out[row] for task, out in result.raw.items()})
    return [
        {
            task: bundle.calibration[task](
                np.stack([outputs[task] for outputs in stay]), np.arange(len(stay))
            )
            for task in network.model.config.heads
        }
        for stay in raw
    ]


def _latest(
    network: Network, backend: TorchCpuBackend, episodes: Sequence[Episode]
) -> list[_Rows] | None:
    """State [T, H] of the last token at each hour of the stays; None without an event stream."""
    if network.model.config.events != "stream":
        return None
    rows = TokenRows(token_positions(network))
    tokens = [_tokens(network, episode) for episode in episodes]
    states = [np.zeros((len(t.ids) + 1, network.model.backbone.hidden_size), np.float32)
              for t in tokens]  # fmt: skip
    n_rows = [rows.n_rows(len(t.ids)) for t in tokens]
    for row in range(max(n_rows)):
        here = [i for i, n in enumerate(n_rows) if row < n]
        token = rows.token(row)
        ids = np.array([tokens[i].ids[token] for i in here], np.int64)
        z = backend.tick_tokens(ids, here, [row % rows.window] * len(here))
        if rows.counts(row):
            for place, i in enumerate(here):
                states[i][token] = z[place]
    # Before the first token its place is -1, where a row of zeros stands.
    return [
        s[np.searchsorted(t.hours, np.arange(e.n_hours), side="right") - 1]
        for s, t, e in zip(states, tokens, episodes, strict=True)
    ]


def _tokens(network: Network, episode: Episode) -> EventTokens:
    n_hours = min(episode.n_hours, network.preprocessing.max_hours)
    made = event_tokens(episode, network.vocabulary, n_hours, network.preprocessing)
    n = network.model.max_tokens
    return EventTokens(ids=made.ids[:n], hours=made.hours[:n])
