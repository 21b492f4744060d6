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
from llm4ehr.episode import Episode, EventTokens, event_tokens, featurise
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


@torch.inference_mode()
def score_episodes(
    network: Network, episodes: Sequence[Episode], batch_size: int = 32
) -> Iterator[EpisodeScores]:
    """Score every hour of every stay, in the given order; stays without an hour give no rows."""
    model = network.model.eval()
    device = next(model.parameters()).device
    tokens = [_tokens(network, e) for e in episodes]
    features = [
        featurise(e, network.vocabulary, network.preprocessing, e.n_hours) for e in episodes
    ]
    lengths = np.array([len(f.series) for f in features], dtype=np.int64)
    scores: dict[int, EpisodeScores] = {}
    by_length = np.argsort(lengths, kind="stable")
    for start in range(0, len(by_length), batch_size):
        rows = [int(i) for i in by_length[start : start + batch_size]]
        longest = int(lengths[rows].max())
        if longest:
            series = _padded([features[i].series for i in rows], longest).to(device)
            events = _padded([features[i].events for i in rows], longest).to(device)
            mask = torch.arange(longest) < torch.from_numpy(lengths[rows])[:, None]
            # A row without a single hour would have nothing to attend to.
            mask[:, 0] = True
            of_tokens = (t.to(device) for t in _padded_tokens([tokens[i] for i in rows]))
            states = model.encode_stay(series, events, mask.to(device), *of_tokens)
            outputs = {t: out.float().cpu().numpy() for t, out in model.predict(states).items()}
            hidden = states.float().cpu().numpy()
        else:
            outputs = {
                t: np.zeros((len(rows), 0, n), np.float32) for t, n in model.config.heads.items()
            }
            hidden = np.zeros((len(rows), 0, model.state_size), np.float32)
        for row, i in enumerate(rows):
            scores[i] = EpisodeScores(
                episode_id=episodes[i].episode_id,
                raw={task: out[row, : lengths[i]] for task, out in outputs.items()},
                hidden=hidden[row, : lengths[i]],
                observed=features[i].observed,
            )
    for i in range(len(episodes)):
        yield scores[i]


def _tokens(network: Network, episode: Episode) -> EventTokens:
    """Event tokens of a stay as far as the network reads them."""
    model, preprocessing = network.model, network.preprocessing
    n_hours = min(episode.n_hours, preprocessing.max_hours)
    if model.config.events != "stream" or n_hours == 0:
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
