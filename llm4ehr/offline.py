"""Whole stays at once: the road of evaluation and batch scoring.

Free shapes instead of the engine's fixed rows, so results agree with online answers within
`TOLERANCE`, not to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from llm4ehr.bundle import Network
from llm4ehr.calibration import Calibration
from llm4ehr.episode import N_VARIABLES, Episode, EventTokens, event_tokens, featurise
from llm4ehr.model import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """How far fp32 roads may differ (absolute), measured on real weights in tests/parity."""

    probability: float = 1e-5
    hidden: float = 1e-4
    hours: float = 1e-2  # of remaining stay


TOLERANCE = Tolerance()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EpisodeScores:
    """Raw head outputs (before calibration) and states of one stay, one row an hour."""

    episode_id: str
    raw: dict[Task, NDArray[np.float32]]  # [T, n]
    hidden: NDArray[np.float32]  # [T, state_size]
    observed: NDArray[np.bool_]  # [T, 11]

    def answers(self, calibration: Calibration) -> dict[Task, NDArray[np.float64]]:
        """Probabilities and hours, [T, n]."""
        hours = np.arange(len(self.hidden))
        return {task: calibration[task](raw, hours) for task, raw in self.raw.items()}


BATCH_HOURS = {"cpu": 640, "cuda": 1 << 16}
"""Hours of a batch, padding included. On a CPU its activations then stay in the cache, and what
they need is not handed back to the kernel and zeroed anew."""


@torch.inference_mode()
def score_episodes(
    network: Network, episodes: Sequence[Episode], batch_hours: int | None = None
) -> Iterator[EpisodeScores]:
    """Score every hour of every stay, in the given order; stays without an hour give no rows.

    Stays of similar length are computed together, as many as have `batch_hours` hours with their
    padding (a longer one goes alone); by default what suits the device.
    """
    model = network.model.eval()
    device = next(model.parameters()).device
    if batch_hours is None:
        batch_hours = BATCH_HOURS.get(device.type, BATCH_HOURS["cpu"])
    lengths = [min(e.n_hours, network.preprocessing.max_hours) for e in episodes]
    scores: dict[int, EpisodeScores] = {}
    for rows in _batches(lengths, batch_hours):
        batch = [episodes[i] for i in rows]
        scores |= zip(rows, _score_batch(network, batch, device), strict=True)
    for i, episode in enumerate(episodes):
        yield scores[i] if lengths[i] else _nothing(network, episode)


def _batches(lengths: Sequence[int], batch_hours: int) -> Iterator[list[int]]:
    """Places of the stays that have an hour, longest first, in batches of similar lengths."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not lengths[i]:
            break
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_hours:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _score_batch(
    network: Network, episodes: Sequence[Episode], device: torch.device
) -> Iterator[EpisodeScores]:
    """Score stays that have at least one hour, the first of them the longest."""
    model = network.model
    features = [
        featurise(e, network.vocabulary, network.preprocessing, e.n_hours) for e in episodes
    ]
    lengths = torch.tensor([len(f.series) for f in features])
    longest = len(features[0].series)
    states = model.encode_stay(
        _padded([f.series for f in features], longest).to(device),
        _padded([f.events for f in features], longest).to(device),
        (torch.arange(longest) < lengths[:, None]).to(device),
        *(t.to(device) for t in _padded_tokens([_tokens(network, e) for e in episodes])),
    )
    outputs = {task: out.float().cpu().numpy() for task, out in model.predict(states).items()}
    hidden = states.float().cpu().numpy()
    for row, (episode, f) in enumerate(zip(episodes, features, strict=True)):
        n = len(f.series)
        yield EpisodeScores(
            episode_id=episode.episode_id,
            raw={task: out[row, :n] for task, out in outputs.items()},
            hidden=hidden[row, :n],
            observed=f.observed,
        )


def _nothing(network: Network, episode: Episode) -> EpisodeScores:
    """Scores of a stay without an hour."""
    config = network.model.config
    return EpisodeScores(
        episode_id=episode.episode_id,
        raw={task: np.zeros((0, n), np.float32) for task, n in config.heads.items()},
        hidden=np.zeros((0, network.model.state_size), np.float32),
        observed=np.zeros((0, N_VARIABLES), np.bool_),
    )


def _tokens(network: Network, episode: Episode) -> EventTokens:
    """Event tokens of a stay as far as the network reads them."""
    model, preprocessing = network.model, network.preprocessing
    n_hours = min(episode.n_hours, preprocessing.max_hours)
    if model.config.events != "stream":
        return EventTokens(ids=np.zeros(0, np.int32), hours=np.zeros(0, np.int16))
    made = event_tokens(episode, network.vocabulary, n_hours, preprocessing)
    return EventTokens(ids=made.ids[: model.max_tokens], hours=made.hours[: model.max_tokens])


def _padded_tokens(
    tokens: list[EventTokens],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, hours and mask, [B, N] with at least one column."""
    widest = max(1, *(len(t.ids) for t in tokens))
    ids = np.zeros((len(tokens), widest), np.int64)
    hours = np.full((len(tokens), widest), -1, np.int64)
    for row, made in enumerate(tokens):
        ids[row, : len(made.ids)] = made.ids
        hours[row, : len(made.ids)] = made.hours
    return torch.from_numpy(ids), torch.from_numpy(hours), torch.from_numpy(hours >= 0)


def _padded(arrays: list[NDArray[np.float32]], longest: int) -> torch.Tensor:
    out = np.zeros((len(arrays), longest, arrays[0].shape[1]), np.float32)
    for row, array in enumerate(arrays):
        out[row, : len(array)] = array
    return torch.from_numpy(out)
