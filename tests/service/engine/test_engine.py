"""The online engine on a real backend: who is answered with what, and what it costs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry

from llm4ehr.bundle import Bundle, Network
from llm4ehr.calibration import default_calibration
from llm4ehr.episode import Episode, empty_episode
from llm4ehr.model import LLM4EHR
from service.core import BundleInfo, Overloaded
from service.engine.backends.torch_cpu import TorchCpuBackend
from service.engine.engine import EngineStopped
from tests.online import (
    HEADS,
    NUMERICS,
    PHENOTYPES,
    ROWS,
    Gate,
    Replica,
    assert_same_bits,
    engine_on,
    tiny_bundle,
    until,
    view_of,
    with_value,
)

pytestmark = pytest.mark.anyio

Stay = Callable[..., Episode]


@pytest.fixture(scope="module")
def bundle(tiny_network: Callable[..., Network]) -> Bundle:
    return tiny_bundle(tiny_network)


@pytest.fixture(scope="module")
def replica(bundle: Bundle) -> Replica:
    return Replica(bundle)


@pytest.fixture(scope="module")
def stay(random_episode: Stay) -> Episode:
    return random_episode(1, 30)


def gate(bundle: Bundle, n_slots: int = 4) -> Gate:
    return Gate(TorchCpuBackend(bundle.network, n_slots=n_slots, max_rows=ROWS))


async def held(gate: Gate, submit: Callable[[], asyncio.Future]) -> asyncio.Future:
    """Close the gate, submit, and come back when the engine stands before it."""
    gate.open.clear()
    gate.entered.clear()
    future = submit()
    await asyncio.to_thread(gate.entered.wait, 60)
    return future


async def test_answers_every_hour(
    family: str, tiny_network: Callable[..., Network], stay: Episode
) -> None:
    bundle = tiny_bundle(tiny_network, family)
    async with engine_on(bundle) as engine:
        scores = await engine.submit(view_of(stay, seq=7))
    assert scores.seq == 7
    assert_same_bits(scores, Replica(bundle)(stay))
    assert len({h.mortality for h in scores.hours}) == 30  # the network looks at its input


async def test_hours_without_data_and_stays_without_hours(
    bundle: Bundle, replica: Replica, stay: Episode
) -> None:
    nothing = empty_episode("nothing")
    async with engine_on(bundle) as engine:
        assert (await engine.submit(view_of(nothing))).hours == ()
        assert_same_bits(await engine.submit(view_of(nothing), 3), replica(nothing, 3))
        assert_same_bits(
            await engine.submit(view_of(until(stay, 10)), 14), replica(until(stay, 10), 14)
        )
        assert_same_bits(await engine.submit(view_of(stay), 4), replica(stay))
        assert len((await engine.submit(view_of(stay), 500)).hours) == 200


async def test_growing_hour_by_hour_computes_each_hour_once(
    bundle: Bundle, replica: Replica, stay: Episode
) -> None:
    backend = gate(bundle)
    async with engine_on(bundle, backend=backend) as engine:
        for n in range(1, 31):
            scores = await engine.submit(view_of(until(stay, n), seq=n))
            assert_same_bits(scores, replica(until(stay, n)))
    assert [hour for tick in backend.ticks for _, hour in tick] == list(range(30))


async def test_a_correction_computes_its_tail_again(
    bundle: Bundle, replica: Replica, stay: Episode
) -> None:
    backend = gate(bundle)
    async with engine_on(bundle, backend=backend) as engine:
        before = await engine.submit(view_of(stay))
        corrected = with_value(stay, 21, 143.0)
        after = await engine.submit(view_of(corrected, seq=2))
        n_rows = backend.n_rows
        assert_same_bits(await engine.submit(view_of(corrected, seq=3)), after)
        back = await engine.submit(view_of(stay, seq=4))
    assert n_rows == 30 + 9
    assert backend.n_rows == n_rows + 9  # the same features again cost nothing
    assert_same_bits(after, replica(corrected))
    assert after.hours[:21] == before.hours[:21]
    assert after.hours[21] != before.hours[21]
    assert_same_bits(back, before)


async def test_a_stay_may_shrink_and_grow(bundle: Bundle, replica: Replica, stay: Episode) -> None:
    async with engine_on(bundle) as engine:
        for seq, n in enumerate((30, 5, 12, 0, 30, 29, 30), start=1):
            scores = await engine.submit(view_of(until(stay, n), seq=seq))
            assert_same_bits(scores, replica(until(stay, n)))


async def test_what_is_not_an_input_is_up_to_date_too(
    tiny_network: Callable[..., Network], make_episode: Stay
) -> None:
    """A value measured to be what was carried forward changes no feature, but fewer are imputed."""
    bundle = tiny_bundle(tiny_network)
    values_only = replace(bundle.network.preprocessing, observed_inputs=False)
    model = LLM4EHR(replace(bundle.network.model.config, n_series=values_only.n_series))
    network = replace(bundle.network, model=model.eval(), preprocessing=values_only)
    bundle = replace(bundle, network=network)
    before = make_episode([("hr", 0.5, 80.0), ("hr", 2.5, 90.0)], n_hours=3)
    after = make_episode([("hr", 0.5, 80.0), ("hr", 1.5, 80.0), ("hr", 2.5, 90.0)], n_hours=3)
    async with engine_on(bundle) as engine:
        await engine.submit(view_of(before))
        scores = await engine.submit(view_of(after, seq=2))
    assert_same_bits(scores, Replica(bundle)(after))


# Many requests for one stay.


async def test_only_the_newest_view_is_computed(
    bundle: Bundle, replica: Replica, stay: Episode, random_episode: Stay
) -> None:
    backend = gate(bundle)
    async with engine_on(bundle, backend=backend) as engine:
        first = await held(backend, lambda: engine.submit(view_of(random_episode(2, 3))))
        futures = [engine.submit(view_of(until(stay, n), seq=n)) for n in range(1, 31)]
        backend.open.set()
        scores = await asyncio.gather(*futures)
        await first
    assert {s.seq for s in scores} == {30}
    for s in scores:
        assert_same_bits(s, replica(stay))
    assert backend.n_rows == 3 + 30


async def test_a_view_that_comes_while_an_older_one_is_computed(
    bundle: Bundle, replica: Replica, stay: Episode
) -> None:
    """The first tick of the old view is under way: what it computes of changed hours is dropped."""
    corrected = with_value(stay, 3, 155.0)
    backend = gate(bundle)
    async with engine_on(bundle, backend=backend) as engine:
        old = await held(backend, lambda: engine.submit(view_of(stay, seq=1)))
        new = engine.submit(view_of(corrected, seq=2))
        backend.open.set()
        for scores in await asyncio.gather(old, new):
            assert scores.seq == 2
            assert_same_bits(scores, replica(corrected))
    hours = [hour for tick in backend.ticks for _, hour in tick]
    assert hours == [*range(16), *range(3, 30)]


async def test_an_older_view_takes_nothing_back(
    bundle: Bundle, replica: Replica, stay: Episode
) -> None:
    """A reader may submit what it holds after a writer has submitted more."""
    backend = gate(bundle)
    older = view_of(until(stay, 5), seq=1)
    async with engine_on(bundle, backend=backend) as engine:
        newer = await held(backend, lambda: engine.submit(view_of(stay, seq=2)))
        beside = engine.submit(older)
        backend.open.set()
        for scores in (await newer, await beside, await engine.submit(older)):
            assert scores.seq == 2
            assert_same_bits(scores, replica(stay))
    assert backend.n_rows == 30


async def test_everyone_gets_the_hours_they_asked_for(
    bundle: Bundle, replica: Replica, stay: Episode
) -> None:
    known = until(stay, 6)
    backend = gate(bundle)
    async with engine_on(bundle, backend=backend) as engine:
        first = await held(backend, lambda: engine.submit(view_of(known), 20))
        futures = [engine.submit(view_of(known), n) for n in (None, 26, 3, 12)]
        backend.open.set()
        for scores in await asyncio.gather(first, *futures):
            assert_same_bits(scores, replica(known, 26))
    assert backend.n_rows == 26


async def test_a_cancelled_request_costs_nothing(bundle: Bundle, stay: Episode) -> None:
    backend = gate(bundle)
    async with engine_on(bundle, backend=backend) as engine:
        first = await held(backend, lambda: engine.submit(view_of(until(stay, 2))))
        lost = engine.submit(view_of(stay, seq=2))
        lost.cancel()
        backend.open.set()
        assert (await first).seq == 1
        await engine.submit_as_of(view_of(until(stay, 1)))
    assert backend.n_rows == 2 + 1


# Past views.


async def test_a_past_view_that_nobody_waits_for_is_not_computed_further(
    bundle: Bundle, replica: Replica, stay: Episode
) -> None:
    backend = gate(bundle)
    async with engine_on(bundle, backend=backend) as engine:
        past = await held(backend, lambda: engine.submit_as_of(view_of(stay)))
        past.cancel()
        await asyncio.sleep(0)
        backend.open.set()
        short = until(stay, 3)
        assert_same_bits(await engine.submit(view_of(short)), replica(short))
        assert engine.status().stays == 1
        assert engine.idle()
    assert backend.n_rows == ROWS + 3


async def test_requests_that_wait_together_are_read_once(
    bundle: Bundle, replica: Replica, stay: Episode, random_episode: Stay
) -> None:
    backend = gate(bundle)
    async with engine_on(bundle, backend=backend) as engine:
        other = await held(backend, lambda: engine.submit(view_of(random_episode(2, 1))))
        futures = [engine.submit(view_of(until(stay, n), seq=n)) for n in (2, 9, 4)]
        backend.open.set()
        for scores in await asyncio.gather(*futures):
            assert scores.seq == 9
            assert_same_bits(scores, replica(until(stay, 9)))
        await other
    assert backend.n_rows == 1 + 9


async def test_who_waits_is_served_before_the_background(
    bundle: Bundle, random_episode: Stay
) -> None:
    backend = gate(bundle, n_slots=8)
    async with engine_on(bundle, backend=backend) as engine:
        first = random_episode(1, 1)
        held_up = await held(backend, lambda: engine.submit(view_of(first)))
        done: list[str] = []
        futures = [held_up]
        for seed in (2, 3, 4):
            name = f"background {seed}"
            future = engine.submit(view_of(random_episode(seed, 30)), background=True)
            future.add_done_callback(lambda _, name=name: done.append(name))
            futures.append(future)
        for name, seed in (("waited for too", 4), ("waited for", 5)):
            future = engine.submit(view_of(random_episode(seed, 30)))
            future.add_done_callback(lambda _, name=name: done.append(name))
            futures.append(future)
        backend.open.set()
        await asyncio.gather(*futures)
    assert set(done[:3]) == {"waited for", "waited for too", "background 4"}
    assert done[3:] == ["background 2", "background 3"]


async def test_what_was_handed_out_does_not_change(bundle: Bundle, stay: Episode) -> None:
    async with engine_on(bundle) as engine:
        before = await engine.submit(view_of(stay))
        copy = before.embeddings.copy()
        await engine.submit(view_of(with_value(stay, 3, 150.0), seq=2))
        await engine.submit(view_of(until(stay, 12), seq=3))
    assert before.embeddings.tobytes() == copy.tobytes()
    with pytest.raises(ValueError, match="read-only"):
        before.embeddings[0] = 0


async def test_an_hour_that_comes_out_differently_again_is_noticed(
    bundle: Bundle, stay: Episode, random_episode: Stay, caplog: pytest.LogCaptureFixture
) -> None:
    registry = CollectorRegistry()
    backend = gate(bundle, n_slots=1)
    async with engine_on(bundle, backend=backend, registry=registry) as engine:
        before = await engine.submit(view_of(until(stay, 29)))
        await engine.submit(view_of(random_episode(2, 4)))  # takes the slot
        weight = bundle.network.model.series_encoder.series[0].weight
        copied = backend._backend._model.series_encoder.series[0].weight
        assert copied is not weight
        copied.data[0] += 1
        after = await engine.submit(view_of(stay, seq=2))
    assert after.embeddings[:29].tobytes() != before.embeddings.tobytes()
    assert registry.get_sample_value("llm4ehr_engine_mismatch_total", {"model": ""}) > 0
    assert "other bits" in caplog.text
    assert stay.episode_id not in caplog.text


async def test_a_past_view_leaves_the_live_one_alone(
    bundle: Bundle, replica: Replica, stay: Episode
) -> None:
    backend = gate(bundle)
    async with engine_on(bundle, backend=backend) as engine:
        await engine.submit(view_of(stay, seq=9))
        past = with_value(until(stay, 12), 5, 44.0)
        for _ in range(2):
            scores = await engine.submit_as_of(view_of(past, seq=4), 13)
            assert scores.seq == 4
            assert_same_bits(scores, replica(past, 13))
        n_rows = backend.n_rows
        live = await engine.submit(view_of(stay, seq=9))
    assert_same_bits(live, replica(stay))
    assert backend.n_rows == n_rows == 30 + 2 * 13  # nothing kept of the past, all of the present


async def test_past_views_share_the_only_slot(
    bundle: Bundle, replica: Replica, stay: Episode
) -> None:
    async with engine_on(bundle, n_slots=1) as engine:
        live = engine.submit(view_of(stay, seq=30))
        past = [engine.submit_as_of(view_of(until(stay, n), seq=n)) for n in (3, 17, 25)]
        assert [s.seq for s in await asyncio.gather(live, *past)] == [30, 3, 17, 25]
        for n, future in zip((3, 17, 25), past, strict=True):
            assert_same_bits(future.result(), replica(until(stay, n)))
        grown = with_value(stay, 30, 99.0)
        assert_same_bits(await engine.submit(view_of(grown, seq=31), 31), replica(grown, 31))


async def test_a_forgotten_stay_is_gone(bundle: Bundle, replica: Replica, stay: Episode) -> None:
    registry, backend = CollectorRegistry(), gate(bundle)
    async with engine_on(bundle, backend=backend, registry=registry) as engine:
        engine.forget("never seen")
        waiting = await held(backend, lambda: engine.submit(view_of(stay)))
        engine.forget(stay.episode_id)
        again = engine.submit(view_of(until(stay, 5), seq=2))
        backend.open.set()
        with pytest.raises(EngineStopped):
            await waiting
        assert_same_bits(await again, replica(until(stay, 5)))
        engine.forget(stay.episode_id)
        await engine.submit_as_of(view_of(until(stay, 1)))
        assert engine.status().slots_used == engine.status().stays == 0


# Load.


async def test_no_more_is_taken_than_can_wait(bundle: Bundle, stay: Episode) -> None:
    backend = gate(bundle)
    async with engine_on(bundle, backend=backend, max_pending=3) as engine:
        first = await held(backend, lambda: engine.submit(view_of(stay)))
        others = [engine.submit_as_of(view_of(stay)), engine.submit(view_of(stay))]
        assert engine.alive()
        for submit in (engine.submit, engine.submit_as_of):
            with pytest.raises(Overloaded):
                submit(view_of(stay))
        others.pop().cancel()
        await asyncio.sleep(0)
        others.append(engine.submit(view_of(stay)))
        backend.open.set()
        await asyncio.gather(first, *others)
        await asyncio.sleep(0)
        await engine.submit(view_of(stay))


async def test_without_an_interval_there_is_none(bundle: Bundle, stay: Episode) -> None:
    bundle = replace(bundle, calibration=default_calibration(list(HEADS)))
    async with engine_on(bundle) as engine:
        hours = (await engine.submit(view_of(stay))).hours
    assert {hour.remaining_los_interval_hours for hour in hours} == {None}
    assert None not in {hour.remaining_los_hours for hour in hours}


async def test_says_which_bundle_answers(bundle: Bundle) -> None:
    async with engine_on(bundle) as engine:
        assert engine.bundle == BundleInfo(
            name="tiny",
            version="1",
            digest=bundle.digest,
            preprocessing_digest=bundle.network.preprocessing_digest,
            tasks=tuple(HEADS),
            phenotypes=PHENOTYPES,
            causal=True,
            numerics=NUMERICS,
        )
