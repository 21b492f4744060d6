"""Heads that read an event stream: a second slot array under the same primitive."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from llm4ehr.bundle import Bundle, Network
from llm4ehr.episode import Episode, event_tokens
from llm4ehr.offline import TOLERANCE, score_episodes
from service.core import ModelFault, Scores
from service.engine.backends.torch_cpu import TorchCpuBackend
from tests.online import ROWS, Gate, assert_same_bits, engine_on, tiny_bundle, until, view_of

pytestmark = pytest.mark.anyio

Make = Callable[..., Network]
Stay = Callable[..., Episode]

N_HOURS = 24


@pytest.fixture(scope="module", params=[(8, False), (4, True), (None, True)], ids=str)
def bundle(request: pytest.FixtureRequest, tiny_network: Make) -> Bundle:
    window, begin = request.param
    made = tiny_bundle(tiny_network, events="stream", event_window=window, begin_token=begin)
    if begin:
        made.network.model.begin.normal_()
    return made


@pytest.fixture(scope="module")
def stay(random_episode: Stay) -> Episode:
    return random_episode(1, N_HOURS)


def gate(bundle: Bundle, n_slots: int = 4) -> Gate:
    return Gate(TorchCpuBackend(bundle.network, n_slots=n_slots, max_rows=ROWS))


async def scored(bundle: Bundle, stay: Episode) -> Scores:
    """By an engine that has seen nothing else."""
    async with engine_on(bundle) as engine:
        return await engine.submit(view_of(stay))


async def test_it_agrees_with_the_pass_over_the_whole_stay(bundle: Bundle, stay: Episode) -> None:
    scores = await scored(bundle, stay)
    (offline,) = score_episodes(bundle.network, [stay])
    assert scores.embeddings.shape == offline.hidden.shape
    assert_allclose(scores.embeddings, offline.hidden, rtol=0, atol=TOLERANCE.hidden)
    expected = bundle.calibration["mortality"](offline.raw["mortality"], np.arange(N_HOURS))[:, 0]
    assert_allclose([h.mortality for h in scores.hours], expected, atol=TOLERANCE.probability)
    n_tokens = len(
        event_tokens(stay, bundle.network.vocabulary, N_HOURS, bundle.network.preprocessing).ids
    )
    assert n_tokens > 16  # more than one window


async def test_hour_by_hour_it_computes_what_is_new(bundle: Bundle, stay: Episode) -> None:
    backend = gate(bundle)
    whole = await scored(bundle, stay)
    async with engine_on(bundle, backend=backend) as engine:
        for n in range(1, N_HOURS + 1):
            scores = await engine.submit(view_of(until(stay, n), seq=n))
            assert scores.embeddings.tobytes() == whole.embeddings[:n].tobytes()
    assert [hour for tick in backend.ticks for _, hour in tick] == list(range(N_HOURS))
    window = bundle.network.model.config.event_window
    n_tokens = len(
        event_tokens(stay, bundle.network.vocabulary, N_HOURS, bundle.network.preprocessing).ids
    )
    n_rows = sum(map(len, backend.token_ticks))
    assert n_tokens <= n_rows <= (n_tokens if window is None else 2 * n_tokens)


async def test_a_late_event_changes_its_hour_and_those_after(bundle: Bundle, stay: Episode) -> None:
    happened = np.flatnonzero(stay.ev_hours > 10)
    late = int(happened[0])
    without = replace(
        stay,
        **{
            name: np.delete(getattr(stay, name), late)
            for name in ("ev_code", "ev_hours", "ev_value")
        },
    )
    hour = int(stay.ev_hours[late])
    async with engine_on(bundle) as engine:
        before = await engine.submit(view_of(without))
        after = await engine.submit(view_of(stay, seq=2))
        assert_same_bits(after, await scored(bundle, stay))
        assert_same_bits(before, await scored(bundle, without))
        assert before.embeddings[:hour].tobytes() == after.embeddings[:hour].tobytes()
        assert before.embeddings[hour].tobytes() != after.embeddings[hour].tobytes()
        back = await engine.submit(view_of(without, seq=3))
    assert_same_bits(back, before)


@settings(max_examples=15)
@given(
    views=st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, N_HOURS), st.booleans()), min_size=1, max_size=8
    ),
    n_slots=st.integers(1, 3),
)
def test_no_history_changes_a_bit(
    bundle: Bundle,
    random_episode: Stay,
    views: list[tuple[int, int, bool]],
    n_slots: int,
) -> None:
    stays = [random_episode(seed, N_HOURS) for seed in range(4)]

    async def happen() -> None:
        last: dict[int, tuple[int, asyncio.Future[Scores]]] = {}
        async with engine_on(bundle, n_slots=n_slots) as engine:
            for seq, (i, n, wait) in enumerate(views, start=1):
                future = engine.submit(view_of(until(stays[i], n), seq=seq))
                last[i] = n, future
                if wait:
                    await future
            got = {i: (n, await future) for i, (n, future) in last.items()}
        for i, (n, scores) in got.items():
            expected = await scored(bundle, until(stays[i], n))
            assert scores.embeddings[:n].tobytes() == expected.embeddings.tobytes()
            assert scores.hours[:n] == expected.hours

    asyncio.run(happen())


async def test_a_token_that_is_not_finite_fails_its_own_stay(
    tiny_network: Make, stay: Episode, make_episode: Stay
) -> None:
    bundle = tiny_bundle(tiny_network, events="stream", event_window=8)
    vocabulary = bundle.network.vocabulary
    codes = sorted(set(stay.ev_code))
    poison, sound = codes[0], codes[1]
    expected = await scored(bundle, make_episode(events=[(sound, 1.0, np.nan)], n_hours=3))
    token = int(vocabulary.code_tokens(vocabulary.indices(np.array([poison], object)))[0])
    bundle.network.model.tokens.weight.data[token] = np.nan
    async with engine_on(bundle) as engine:
        bad = engine.submit(
            view_of(make_episode(events=[(poison, 1.0, np.nan)], n_hours=3, episode_id="bad"))
        )
        good = engine.submit(view_of(make_episode(events=[(sound, 1.0, np.nan)], n_hours=3)))
        with pytest.raises(ModelFault):
            await bad
        assert_same_bits(await good, expected)
        assert engine.alive()
