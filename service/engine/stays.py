"""What the engine holds of one stay: a cache of its log, never the truth."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm4ehr.bundle import Network
from llm4ehr.episode import (
    Episode,
    EventTokens,
    Features,
    empty_episode,
    event_tokens,
    featurise,
    first_difference,
)
from service.core import AnswerLayout, EpisodeView, HourScores, Scores
from service.engine.backends.shapes import token_positions
from service.engine.rows import Rows
from service.engine.scheduler import Urgency
from service.engine.tokens import TokenRows
from service.projection import model_episode


@dataclass(slots=True, eq=False)
class Request:
    """An episode to score up to `n_hours`. `scratch` leaves nothing behind."""

    key: Hashable
    view: EpisodeView
    n_hours: int
    scratch: bool
    future: asyncio.Future[Scores]
    submitted: float
    background: bool = False
    """Nobody waits for it."""
    begun: bool = False
    """Whether a row of it was computed."""
    trace: object = None
    """Where it was asked for, see `service.tracing`."""


class HeldStay:
    """Features of a stay, and what was computed from them.

    `hidden` and `answers` have a row for every hour whose outputs belong to `features`; with an
    event stream `z` has one for every token with a state, from `valid_rows` rows of the event pass.
    """

    def __init__(self, scratch: bool, state_size: int, layout: AnswerLayout) -> None:
        self.scratch = scratch
        self.seq = 0
        self.episode: Episode = empty_episode("")
        self.features: Features | None = None
        self.tokens = EventTokens(ids=np.zeros(0, np.int32), hours=np.zeros(0, np.int16))
        self.hidden = Rows(state_size, np.float32)
        self.answers = Rows(layout.width, np.float64)
        self.z: Rows[np.float32] | None = None
        self.valid_rows = 0
        self.reached = 0  # hours that were ever computed
        self.counted = 0
        """Bytes that the engine has put down for it."""
        self.waiting: list[Request] = []
        self.rebuild_since: float | None = None
        self._layout = layout

    @property
    def n_hours(self) -> int:
        """Hours there are features of."""
        return 0 if self.features is None else len(self.features.series)

    @property
    def urgency(self) -> Urgency:
        """Who waits for it."""
        if self.scratch:
            return Urgency.PAST
        nobody = all(request.background for request in self.waiting)
        return Urgency.BACKGROUND if nobody else Urgency.LIVE

    @property
    def n_bytes(self) -> int:
        """Memory of the arrays."""
        features, episode = self.features, self.episode
        parts: list[NDArray[Any]] = [
            episode.obs_hours,
            episode.obs_value,
            episode.ev_hours,
            episode.ev_value,
        ]
        parts += [episode.ev_code, self.tokens.ids, self.tokens.hours]
        if features is not None:
            parts += [features.series, features.events, features.observed]
        rows = (self.hidden, self.answers, self.z)
        return sum(p.nbytes for p in parts) + sum(r.n_bytes for r in rows if r is not None)

    @property
    def valid(self) -> int:
        """Hours with outputs."""
        return len(self.hidden)

    def crop(self, hour: int) -> None:
        """Outputs from `hour` on no longer belong to the features."""
        self.hidden.crop(hour)
        self.answers.crop(hour)

    def write(self, answers: NDArray[np.float64], hidden: NDArray[np.float32]) -> None:
        """Keep the outputs of the next hour."""
        self.answers.append(answers)
        self.hidden.append(hidden)
        self.reached = max(self.reached, self.valid)

    def write_token(self, token: int, z: NDArray[np.float32]) -> bool:
        """Keep the state of the next token, or of one that was computed again.

        False if it was there with other bits; those after it are dropped then.
        """
        if self.z is None:
            self.z = Rows(len(z), np.float32)
        if token < len(self.z) and same_bits(self.z[token], z):
            return True
        new = token == len(self.z)
        self.z.crop(token)
        self.z.append(z)
        return new

    def latest(self, hour: int, width: int) -> NDArray[np.float32]:
        """State [width] of the last token of an hour or before, zeros if there is none."""
        token = int(np.searchsorted(self.tokens.hours, hour, side="right")) - 1
        return np.zeros(width, np.float32) if token < 0 or self.z is None else self.z[token]

    def scores(self) -> Scores:
        """All hours."""
        return Scores(
            seq=self.seq,
            hours=HourScores(self._layout, self.answers.view()),
            embeddings=self.hidden.view(),
        )


def same_bits(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    """Whether two rows are equal to the last bit."""
    return bool(a.tobytes() == b.tobytes())


class Reader:
    """Turns views into model input; what has not changed is not computed again."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._fused = network.model.config.events == "fused"
        window = token_positions(network)
        self.tokens = TokenRows(window) if window else None
        """How tokens become rows, if the heads read an event stream."""

    def read(self, stay: HeldStay, view: EpisodeView, n_hours: int) -> int:
        """Bring the features of a stay up to a view; returns the first hour that differs.

        Outputs from there on are dropped, and states of tokens from the first that differs.
        """
        network, known = self._network, stay.features
        episode = model_episode(view, network.vocabulary)
        first = 0
        if known is not None:
            differs = first_difference(stay.episode, episode, network.preprocessing)
            first = min(differs, len(known.series), n_hours)
        features = featurise(
            episode, network.vocabulary, network.preprocessing, n_hours, known, first
        )
        hour = first if known is None else self._common_hours(known, features, first)
        if self.tokens is not None:
            hour = min(hour, self._read_tokens(stay, self.tokens, episode, n_hours))
        stay.episode, stay.features, stay.seq = episode, features, view.seq
        stay.crop(hour)
        return hour

    def _common_hours(self, old: Features, new: Features, first: int) -> int:
        """Number of leading hours with the same features, bit for bit; up to `first` they are."""
        n = min(len(old.series), len(new.series))
        part = slice(first, n)
        differs = (old.series[part] != new.series[part]).any(1)
        if self._fused:
            differs |= (old.events[part] != new.events[part]).any(1)
        # Answers show it; not all inputs do.
        differs |= (old.observed[part] != new.observed[part]).any(1)
        return int(np.argmax(differs)) + first if differs.any() else n

    def _read_tokens(self, stay: HeldStay, rows: TokenRows, episode: Episode, n_hours: int) -> int:
        """The same for the tokens; returns the hour of the first that differs."""
        network, old = self._network, stay.tokens
        new = event_tokens(episode, network.vocabulary, n_hours, network.preprocessing)
        limit = network.model.max_tokens
        new = EventTokens(ids=new.ids[:limit], hours=new.hours[:limit])
        n = min(len(old.ids), len(new.ids))
        differs = (old.ids[:n] != new.ids[:n]) | (old.hours[:n] != new.hours[:n])
        token = int(np.argmax(differs)) if differs.any() else n
        stay.tokens = new
        stay.valid_rows = min(stay.valid_rows, rows.first_row(token))
        if stay.z is not None:
            stay.z.crop(token)
        return min(
            (int(hours[token]) for hours in (old.hours, new.hours) if token < len(hours)),
            default=n_hours,
        )


def features_of(stay: HeldStay) -> Features:
    """Features of a stay that was read."""
    assert stay.features is not None
    return stay.features
