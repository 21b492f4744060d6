"""What the engine holds of one stay: a cache of its log, never the truth."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from dataclasses import dataclass

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
from service.core import EpisodeView, HourScore, Scores
from service.engine.tokens import TokenRows
from service.projection import model_episode

_CAPACITY = 32  # hours or tokens that there is room for at first


@dataclass(slots=True, eq=False)
class Request:
    """An episode to score up to `n_hours`. `scratch` leaves nothing behind."""

    key: Hashable
    view: EpisodeView
    n_hours: int
    scratch: bool
    future: asyncio.Future[Scores]
    submitted: float
    begun: bool = False
    """Whether a row of it was computed."""
    trace: object = None
    """Where it was asked for, see `service.tracing`."""


class HeldStay:
    """Features of a stay, and what was computed from them.

    The first `valid` hours have outputs that belong to `features`, and `hours` holds their answers.
    With an event stream the first `valid_rows` rows of the event pass have their states.
    """

    def __init__(self, scratch: bool, state_size: int) -> None:
        self.scratch = scratch
        self.seq = 0
        self.episode: Episode = empty_episode("")
        self.features: Features | None = None
        self.tokens = EventTokens(ids=np.zeros(0, np.int32), hours=np.zeros(0, np.int16))
        self.valid = 0
        self.valid_rows = 0
        self.reached = 0  # hours that were ever computed
        self.hours: list[HourScore] = []
        self.waiting: list[Request] = []
        self.rebuild_since: float | None = None
        self._hidden = np.zeros((_CAPACITY, state_size), np.float32)
        self._published = 0
        self._z = np.zeros((0, 0), np.float32)

    @property
    def n_hours(self) -> int:
        """Hours there are features of."""
        return 0 if self.features is None else len(self.features.series)

    def crop(self, hour: int) -> None:
        """Outputs from `hour` on no longer belong to the features."""
        self.valid = min(self.valid, hour)
        del self.hours[hour:]
        if hour < self._published:
            # Readers hold the rows that are to be written again.
            self._hidden = self._hidden.copy()
            self._published = hour

    def write(self, score: HourScore, hidden: NDArray[np.float32]) -> None:
        """Keep the outputs of the next hour."""
        self._hidden = _with_room(self._hidden, self.valid)
        self._hidden[self.valid] = hidden
        self.hours.append(score)
        self.valid += 1
        self.reached = max(self.reached, self.valid)

    def write_token(self, token: int, z: NDArray[np.float32]) -> None:
        """Keep the state of a token."""
        if not len(self._z):
            self._z = np.zeros((_CAPACITY, len(z)), np.float32)
        self._z = _with_room(self._z, token)
        self._z[token] = z

    def latest(self, hour: int, width: int) -> NDArray[np.float32]:
        """State [width] of the last token of an hour or before, zeros if there is none."""
        token = int(np.searchsorted(self.tokens.hours, hour, side="right")) - 1
        return self._z[token] if token >= 0 else np.zeros(width, np.float32)

    def same_bits(self, hour: int, hidden: NDArray[np.float32]) -> bool:
        """Whether an hour that was computed again gave what it gave before."""
        return bool(self._hidden[hour].tobytes() == hidden.tobytes())

    def scores(self) -> Scores:
        """All hours. The embeddings are a view that is never written to again."""
        n = self.n_hours
        self._published = max(self._published, n)
        embeddings = self._hidden[:n]
        embeddings.flags.writeable = False
        return Scores(seq=self.seq, hours=tuple(self.hours[:n]), embeddings=embeddings)


class Reader:
    """Turns views into model input; what has not changed is not computed again."""

    def __init__(self, network: Network) -> None:
        self._network = network
        config = network.model.config
        self.tokens: TokenRows | None = None
        """How tokens become rows, if the heads read an event stream."""
        if config.events == "stream":
            self.tokens = TokenRows(config.event_window or network.model.max_tokens)

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
        hour = first if known is None else _common_hours(known, features, first)
        if self.tokens is not None:
            hour = min(hour, self._read_tokens(stay, self.tokens, episode, n_hours))
        stay.episode, stay.features, stay.seq = episode, features, view.seq
        stay.crop(hour)
        return hour

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
        return min(
            (int(hours[token]) for hours in (old.hours, new.hours) if token < len(hours)),
            default=n_hours,
        )


def _with_room(rows: NDArray[np.float32], row: int) -> NDArray[np.float32]:
    """The same rows, in a larger array if there is no place for this one."""
    if row < len(rows):
        return rows
    larger = np.zeros((max(2 * len(rows), row + 1), rows.shape[1]), np.float32)
    larger[: len(rows)] = rows
    return larger


def features_of(stay: HeldStay) -> Features:
    """Features of a stay that was read."""
    assert stay.features is not None
    return stay.features


def _common_hours(old: Features, new: Features, first: int) -> int:
    """Number of leading hours in which the features are the same; they are so up to `first`."""
    n = min(len(old.series), len(new.series))
    part = slice(first, n)
    differs = (old.series[part] != new.series[part]).any(1)
    differs |= (old.events[part] != new.events[part]).any(1)
    # Answers show it; not all inputs do.
    differs |= (old.observed[part] != new.observed[part]).any(1)
    return int(np.argmax(differs)) + first if differs.any() else n
