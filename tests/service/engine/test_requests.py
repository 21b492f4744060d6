"""What the engine makes of requests: what is read once, kept, refused, and in which order."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from llm4ehr.bundle import Bundle, Network
from llm4ehr.episode import Episode
from service.core import EngineStopped, ModelFault
from service.engine.backends.torch_cpu import TorchCpuBackend
from service.engine.slots import Lease, SlotError
from tests.online import (
    ROWS,
    Gate,
    Replica,
    assert_same_bits,
    engine_of,
    engine_on,
    tiny_bundle,
    view_of,
)

pytestmark = pytest.mark.anyio

Make = Callable[..., Network]
Stay = Callable[..., Episode]


@pytest.fixture(scope="module")
def bundle(tiny_network: Make) -> Bundle:
    return tiny_bundle(tiny_network)


def gate(bundle: Bundle) -> Gate:
    return Gate(TorchCpuBackend(bundle.network, n_slots=4, max_rows=ROWS))


async def test_a_stay_that_cannot_be_read_fails_alone(
    bundle: Bundle, random_episode: Stay, caplog: pytest.LogCaptureFixture
) -> None:
    registry = CollectorRegistry()
    sound, broken = random_episode(1, 20), view_of(random_episode(2, 20))
    broken = replace(broken, episode=replace(broken.episode, obs_value=np.array(["?"])))
    async with engine_on(bundle, registry=registry) as engine:
        bad, good = engine.submit(broken), engine.submit(view_of(sound))
        with pytest.raises(ModelFault):
            await bad
        assert_same_bits(await good, Replica(bundle)(sound))
        assert engine.alive()
    assert registry.get_sample_value("llm4ehr_engine_model_faults_total", {"model": ""}) == 1
    assert broken.episode_id not in caplog.text


async def test_hours_of_the_same_entries_are_kept(bundle: Bundle, random_episode: Stay) -> None:
    backend, stay = gate(bundle), random_episode(1, 20)
    async with engine_on(bundle, backend=backend) as engine:
        for n in (30, 20, 30):
            assert len((await engine.submit(view_of(stay), n)).hours) == 30
    assert backend.n_rows == 30


async def test_events_that_are_no_input_cost_nothing(
    tiny_network: Make, random_episode: Stay
) -> None:
    bundle = tiny_bundle(tiny_network, events="none")
    backend, stay = gate(bundle), random_episode(1, 20)
    fewer = replace(
        stay, ev_code=stay.ev_code[1:], ev_hours=stay.ev_hours[1:], ev_value=stay.ev_value[1:]
    )
    async with engine_on(bundle, backend=backend) as engine:
        before = await engine.submit(view_of(fewer))
        assert_same_bits(await engine.submit(view_of(stay, seq=2)), before)
    assert backend.n_rows == 20


class Clock:
    """Stands still unless it is told how long each look takes."""

    def __init__(self, step_s: float) -> None:
        self.now, self.step_s = 1000.0, step_s

    def __call__(self) -> float:
        self.now += self.step_s
        return self.now


@pytest.mark.parametrize(("step_s", "together"), [(0.0, 3), (1.0, 1)])
async def test_unknown_stays_are_read_within_a_budget(
    bundle: Bundle, random_episode: Stay, step_s: float, together: int
) -> None:
    """With time all that came share the first tick; without, a tick goes between two of them."""
    backend = gate(bundle)
    engine = engine_of(bundle, backend=backend, clock=Clock(step_s))
    stays = [random_episode(seed, 1) for seed in range(3)]
    backend.open.clear()
    engine.start()
    try:
        first = engine.submit(view_of(random_episode(9, 1)))
        await asyncio.to_thread(backend.entered.wait, 60)
        futures = [engine.submit(view_of(stay)) for stay in stays]
        backend.open.set()
        await asyncio.gather(first, *futures)
    finally:
        engine.close()
    assert len(backend.ticks[1]) == together


async def test_a_stay_that_was_just_asked_for_is_not_dropped_for_want_of_memory(
    bundle: Bundle, random_episode: Stay
) -> None:
    backend, replica = gate(bundle), Replica(bundle)
    stays = [random_episode(seed, 20) for seed in range(3)]
    async with engine_on(bundle, backend=backend) as engine:
        await asyncio.gather(*(engine.submit(view_of(stay)) for stay in stays))
        backend.open.clear()
        backend.entered.clear()
        busy = engine.submit_as_of(view_of(random_episode(9, 1)))
        await asyncio.to_thread(backend.entered.wait, 60)
        engine._max_state_bytes = 1
        futures = [engine.submit(view_of(stay, seq=2), 24) for stay in stays]
        backend.open.set()
        for stay, scores in zip(stays, await asyncio.gather(*futures), strict=True):
            assert_same_bits(scores, replica(stay, 24))
        await busy
        assert engine.alive()


async def test_the_books_are_checked_when_there_is_time(
    bundle: Bundle, random_episode: Stay
) -> None:
    failed: list[BaseException] = []
    engine = engine_of(bundle, clock=Clock(2.0), on_fatal=failed.append)
    engine.start()
    try:
        await engine.submit(view_of(random_episode(1, 2)))
        engine._lanes.slots._owned["nobody"] = Lease(0, 1)
        with contextlib.suppress(EngineStopped):  # the check may come before the answer
            await engine.submit(view_of(random_episode(1, 2)))
        await asyncio.to_thread(engine._thread.join, 60)
    finally:
        engine.close()
    assert [type(error) for error in failed] == [SlotError]
