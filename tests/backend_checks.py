"""What every backend must do, whatever computes it: for tests with and without a device."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.testing import assert_allclose

from llm4ehr.bundle import Network
from llm4ehr.calibration import default_calibration
from llm4ehr.episode import Episode
from llm4ehr.offline import TOLERANCE, score_episodes
from service.core import Scores
from service.engine.backends.base import Backend, TickResult
from service.engine.backends.onnx_runtime import OnnxBackend
from service.engine.backends.torch_cuda import TorchCudaBackend
from service.engine.backends.verify import Sizable, agreeing_sizes
from tests.backends import computed, features_of, joined, same_bits
from tests.online import ROWS, engine_on, tiny_bundle, until, view_of, with_value

N_SLOTS = 5
Outputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """A network, and how to make the backend that is tested, with `N_SLOTS` slots."""

    network: Network
    make: Callable[[], Sizable]

    def hours(
        self, backend: Backend, episode: Episode, *, slot: int = 0, chunk: int = 1
    ) -> Outputs:
        """All hours of a stay in one slot, `chunk` hours a tick where they may share one."""
        chunk = chunk if backend.chained else 1
        whole, rest = divmod(episode.n_hours, chunk)
        chunks = [chunk] * whole + [rest] * (rest > 0)
        return computed(backend, features_of(self.network, episode), chunks, slot)  # type: ignore[arg-type]


def check_like_offline(case: Case, episode: Episode) -> None:
    """Answers agree with whole-stay scoring."""
    got = case.hours(case.make(), episode, chunk=ROWS)
    (offline,) = score_episodes(case.network, [episode])
    assert_allclose(got["hidden"], offline.hidden, rtol=0, atol=TOLERANCE.hidden)
    hours = np.arange(len(offline.hidden))
    for task, to_answer in default_calibration(list(offline.raw)).items():
        atol = TOLERANCE.hours if task == "remaining_los" else TOLERANCE.probability
        expected = to_answer(offline.raw[task], hours)
        assert_allclose(to_answer(got[task], hours), expected, rtol=0, atol=atol)


def check_slots_and_chunks(case: Case, episode: Episode) -> None:
    """Neither the slot nor how many hours share a tick changes a bit."""
    backend = case.make()
    alone = case.hours(backend, episode)
    for slot, chunk in ((1, 1), (N_SLOTS - 1, 3), (2, ROWS)):
        assert same_bits(case.hours(backend, episode, slot=slot, chunk=chunk), alone)


def check_company(case: Case, episodes: Sequence[Episode]) -> None:
    """Stays at different hours in shuffled order in one tick come out as each alone."""
    backend, rng = case.make(), np.random.default_rng(0)
    features = [features_of(case.network, episode) for episode in episodes]
    alone = [case.hours(case.make(), episode) for episode in episodes]
    longest = 3 if backend.chained else 1
    at = [0] * len(episodes)
    parts: list[list[TickResult]] = [[] for _ in at]
    while any(a < e.n_hours for a, e in zip(at, episodes, strict=True)):
        rows = [
            (stay, hour)
            for stay in rng.permutation(len(at))[: rng.integers(1, len(at) + 1)]
            for hour in range(at[stay], min(episodes[stay].n_hours, at[stay] + longest))
        ]
        if not rows:
            continue
        rows = [rows[i] for i in rng.permutation(len(rows))]
        result = backend.tick(
            np.stack([features[s].series[h] for s, h in rows]),
            np.stack([features[s].events[h] for s, h in rows]),
            *zip(*rows, strict=True),
        )
        for i in sorted(range(len(rows)), key=lambda i: rows[i]):
            raw = {task: out[i : i + 1] for task, out in result.raw.items()}
            stay, hour = rows[i]
            parts[stay].append(TickResult(raw=raw, hidden=result.hidden[i : i + 1]))
            at[stay] = hour + 1
    for got, expected in zip(parts, alone, strict=True):
        assert same_bits(joined(got), expected)


def check_tail_again(case: Case, episode: Episode) -> None:
    """A slot is cropped by writing over it, and taken over by another stay in the same way."""
    backend, features = case.make(), features_of(case.network, episode)
    alone = case.hours(backend, episode)
    for hour in range(9, 20):
        rows = slice(hour, hour + 1)
        backend.tick(features.series[rows] + 1, features.events[rows], [0], [hour])
    again = [
        backend.tick(features.series[h : h + 1], features.events[h : h + 1], [0], [h])
        for h in range(9, episode.n_hours)
    ]
    assert same_bits(joined(again), {name: rows[9:] for name, rows in alone.items()})


def check_sizes(case: Case, episode: Episode) -> None:
    """Every tick size that verification lets pass, and every length of the past, has equal bits."""
    alone, backend = case.hours(case.make(), episode), case.make()
    sizes = agreeing_sizes(backend, case.network, ROWS)
    assert sizes[-1] == ROWS
    backend.tick_sizes = sizes
    if isinstance(backend, OnnxBackend):
        backend.past_lengths = backend.agreeing_lengths()
        assert backend.past_lengths[-1] == case.network.preprocessing.max_hours
    assert same_bits(case.hours(backend, episode, chunk=3), alone)
    for size in sizes:
        backend.tick_sizes = (size,)
        assert same_bits(case.hours(backend, episode, chunk=size, slot=1), alone)


def check_nothing_else_is_read(case: Case, episode: Episode) -> None:
    """What is left in later hours and in other slots does not count, however large."""
    alone = case.hours(case.make(), episode)
    backend = case.make()
    if isinstance(backend, TorchCudaBackend):
        for cache in backend._caches.values():
            for pool in (*cache.keys, *cache.values):
                pool[:, :, cache.first :] = float("nan")
                pool[torch.arange(len(pool)) != 2] = float("nan")
    else:
        assert isinstance(backend, OnnxBackend)
        # No more than this is ever written: see `check_a_broken_stay_leaves_nothing`.
        backend._pool.fill_(-1e18)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    assert same_bits(case.hours(backend, episode, slot=2, chunk=3), alone)


def check_a_broken_stay_leaves_nothing(case: Case, episode: Episode) -> None:
    """A stay whose numbers are not finite breaks no neighbour, nor whoever has its slot next."""
    alone = case.hours(case.make(), episode)
    backend, features = case.make(), features_of(case.network, episode)
    n = min(9, episode.n_hours)
    for hour in range(n):
        series = np.stack([features.series[hour], np.full_like(features.series[hour], np.nan)])
        series[1, ::2] = np.inf
        result = backend.tick(series, features.events[[hour, hour]], [0, 1], [hour, hour])
        assert result.hidden[:1].tobytes() == alone["hidden"][hour].tobytes()
        assert not np.isfinite(result.hidden[1]).all()
    assert same_bits(case.hours(backend, episode, slot=1), alone)


def check_engine(case: Case, episodes: Sequence[Episode]) -> None:
    """An engine on the backend: more stays than slots, which grow and are then corrected."""
    bundle = tiny_bundle(lambda *_, **__: case.network)
    corrected = [with_value(episode, 3, 101.0) for episode in episodes]

    async def answers() -> list[Scores]:
        async with engine_on(bundle, backend=case.make()) as engine:
            for n in (1, 2, 9):
                views = [view_of(until(episode, n), seq=n) for episode in episodes]
                await asyncio.gather(*map(engine.submit, views))
            views = [view_of(episode, seq=10) for episode in corrected]
            return await asyncio.gather(*map(engine.submit, views))

    for scores, episode in zip(asyncio.run(answers()), corrected, strict=True):
        alone = case.hours(case.make(), episode)
        assert scores.embeddings.tobytes() == alone["hidden"].tobytes()
