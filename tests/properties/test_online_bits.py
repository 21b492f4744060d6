"""Online answers are a pure function of what is on record, to the last bit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm4ehr.bundle import Bundle, Network
from llm4ehr.episode import Episode
from service.core import EpisodeView, Overloaded, Scores, entries_as_of, episode_at
from service.engine.backends.base import OutOfMemory, TickResult
from service.engine.backends.torch_cpu import TorchCpuBackend
from service.engine.backends.verify import agreeing_sizes
from service.engine.engine import EngineStopped, OnlineEngine
from tests.online import (
    ROWS,
    Answers,
    Gate,
    Replica,
    assert_same_bits,
    engine_of,
    tiny_bundle,
    view_of,
)
from tests.properties.clients import N_HOURS, Item, Record, deliveries, said, ventilation
from tests.service.fakes import creatinine, hr

Make = Callable[..., Network]
Stay = Callable[..., Episode]

PATIENCE_S = 60
"""Of one example, which takes less than one."""

# What happens between two requests.
EVENTS = ("answer", "go on", "go on", "forget", "restart", "neighbours", "longer", "no memory")


@pytest.fixture(scope="module", params=["fused", "stream"])
def bundle(tiny_network: Make, request: pytest.FixtureRequest) -> Bundle:
    window = {"event_window": 4} if request.param == "stream" else {}
    return tiny_bundle(tiny_network, events=request.param, **window)


@pytest.fixture(scope="module")
def replica(bundle: Bundle) -> Replica:
    return Replica(bundle)


@pytest.fixture(scope="module")
def neighbours(random_episode: Stay) -> list[EpisodeView]:
    """Stays that share ticks with the one under test and compete for its slot."""
    return [view_of(random_episode(seed, 5 + 4 * seed)) for seed in range(4)]


@pytest.fixture(scope="module")
def tick_sizes(bundle: Bundle) -> tuple[int, ...]:
    backend = TorchCpuBackend(bundle.network, n_slots=4, max_rows=ROWS)
    return agreeing_sizes(backend, bundle.network, ROWS)


class Scarce(Gate):
    """Has no memory for the next tick once it was told so."""

    scarce = False

    def tick(self, *rows: Any) -> TickResult:
        if self.scarce:
            self.scarce = False
            raise OutOfMemory
        return super().tick(*rows)


class Ward:
    """An engine under a stay and its neighbours, to which things happen."""

    def __init__(
        self, bundle: Bundle, neighbours: list[EpisodeView], tick_sizes: tuple[int, ...]
    ) -> None:
        self._bundle, self._neighbours, self._tick_sizes = bundle, neighbours, tick_sizes
        self._engine: OnlineEngine | None = None
        self._futures: list[asyncio.Future[Scores]] = []

    def start(self, n_slots: int) -> None:
        self.stop()
        made = TorchCpuBackend(self._bundle.network, n_slots=n_slots, max_rows=ROWS)
        made.tick_sizes = self._tick_sizes
        self._backend = Scarce(made)
        self._engine = engine_of(self._bundle, backend=self._backend)
        self._engine.start()

    def stop(self) -> None:
        if self._engine is not None:
            self._engine.close()

    async def happen(self, event: str, view: EpisodeView, n_slots: int) -> None:
        """One of `EVENTS`, after the stay has come to be as in `view`."""
        engine = self._engine
        assert engine is not None
        self._futures.append(engine.submit(view))
        if event == "answer":
            await asyncio.wait(self._futures[-1:])
        elif event == "longer":
            self._futures.append(engine.submit(view, N_HOURS + 3))
        elif event == "neighbours":
            self._futures += [engine.submit(n) for n in self._neighbours]
        elif event == "forget":
            engine.forget(view.episode_id)
        elif event == "restart":
            self.start(n_slots)
        elif event == "no memory":
            self._backend.scarce = True

    async def last(self, view: EpisodeView) -> Scores:
        assert self._engine is not None
        self._backend.scarce = False
        scores = await self._engine.submit(view)
        outcomes = await asyncio.gather(*self._futures, return_exceptions=True)
        assert {type(o) for o in outcomes} <= {Scores, EngineStopped, Overloaded}
        return scores

    async def past(self, view: EpisodeView) -> Scores:
        assert self._engine is not None
        return await self._engine.submit_as_of(view)


def everything(bundle: Bundle, items: list[Item]) -> EpisodeView:
    """The stay, had all of it arrived at once."""
    return Record(bundle.network.vocabulary).take(items)


@pytest.mark.timeout(900)  # a failure is made small before it is shown
@given(data=st.data())
@settings(max_examples=80)
def test_what_happens_on_the_way_does_not_matter(
    bundle: Bundle,
    replica: Replica,
    neighbours: list[EpisodeView],
    tick_sizes: tuple[int, ...],
    data: st.DataObject,
) -> None:
    """Order, repetition, splitting, neighbours, slots, eviction, forgetting, restarts, memory."""
    items = data.draw(said())
    requests = data.draw(deliveries(items))
    slots = st.integers(1, 3)
    happenings = [(data.draw(st.sampled_from(EVENTS)), data.draw(slots)) for _ in requests]
    record = Record(bundle.network.vocabulary)

    async def stream() -> tuple[Scores, list[tuple[EpisodeView, Scores]]]:
        ward = Ward(bundle, neighbours, tick_sizes)
        ward.start(data.draw(slots))
        try:
            for request, (event, n_slots) in zip(requests, happenings, strict=True):
                await ward.happen(event, record.take(request), n_slots)
            scores = await ward.last(record.state.view)
            seqs = {1, record.state.seq // 2 or 1, record.state.seq}
            past = [episode_at(entries_as_of(record.state.entries, seq)) for seq in sorted(seqs)]
            return scores, [(view, await ward.past(view)) for view in past]
        finally:
            ward.stop()

    scores, past = asyncio.run(asyncio.wait_for(stream(), PATIENCE_S))
    view = everything(bundle, items)
    # All its hours, and more if someone who still waited had asked for more.
    assert view.head_hour + 1 <= len(scores.hours) <= N_HOURS + 3
    assert_same_bits(scores, replica(view.episode, len(scores.hours)))
    for known, answered in past:
        assert answered.seq == known.seq
        assert_same_bits(answered, replica(known.episode))


def first_hours(scores: Scores | Answers, n: int) -> Answers:
    return Answers(scores.hours[:n], scores.embeddings[:n])


@pytest.mark.timeout(900)
@given(data=st.data())
@settings(max_examples=60)
def test_what_comes_after_an_hour_changes_nothing_up_to_it(
    bundle: Bundle, replica: Replica, data: st.DataObject
) -> None:
    """Whether in the same slot or computed anew, with any items, corrections and withdrawals."""
    t = data.draw(st.sampled_from([0, 1, 2, 4, 7, 10]))
    before = data.draw(said())
    later = [data.draw(said(low=t + 1, prefix=prefix)) for prefix in ("a", "b")]

    async def stream() -> list[Scores]:
        engine = engine_of(bundle, n_slots=1)
        engine.start()
        try:
            record = Record(bundle.network.vocabulary)
            answers = [await engine.submit(record.take(before), N_HOURS)]
            for items in later:
                answers.append(await engine.submit(record.take(items), N_HOURS))
            answers.append(await engine.submit_as_of(record.state.view, N_HOURS))
            return answers
        finally:
            engine.close()

    known = replica(everything(bundle, before).episode, N_HOURS)
    for scores in asyncio.run(asyncio.wait_for(stream(), PATIENCE_S)):
        assert_same_bits(first_hours(scores, t + 1), first_hours(known, t + 1))


def test_answers_react_to_what_is_said(bundle: Bundle, replica: Replica) -> None:
    """Else nothing would be proven above: each kind of item moves its hour and those after."""
    quiet = replica(everything(bundle, _items(hr=80.0)).episode, N_HOURS)
    for change in ({"hr": 81.0}, {"creatinine": 0.7}, {"ventilation": 1.0}):
        moved = replica(everything(bundle, _items(**{"hr": 80.0} | change)).episode, N_HOURS)
        assert moved.hours[:5] == quiet.hours[:5]
        for a, b in zip(moved.hours[5:], quiet.hours[5:], strict=True):
            assert a.mortality != b.mortality
        assert (moved.embeddings[5:] != quiet.embeddings[5:]).any(axis=1).all()


def _items(**values: float) -> list[Item]:
    kinds = {"hr": hr, "creatinine": creatinine, "ventilation": ventilation}
    return [
        ("observations" if name == "hr" else "events", kinds[name](value, 5.0))
        for name, value in values.items()
    ]
