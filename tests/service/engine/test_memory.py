"""The engine when there is not memory for all, or the device is no longer there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from llm4ehr.bundle import Bundle, Network
from llm4ehr.episode import Episode
from service.core import Overloaded
from service.engine.backends.base import DeviceFault, OutOfMemory
from service.engine.backends.torch_cpu import TorchCpuBackend
from service.engine.engine import EngineStopped
from service.engine.slots import SlotError
from tests.online import (
    ROWS,
    Gate,
    Replica,
    assert_same_bits,
    engine_of,
    engine_on,
    tiny_bundle,
    until,
    view_of,
)

pytestmark = pytest.mark.anyio

Stay = Callable[..., Episode]


class Scarce(Gate):
    """Runs out of memory at chosen calls."""

    def __init__(self, bundle: Bundle, n_slots: int, failing: Callable[[int], bool]) -> None:
        super().__init__(TorchCpuBackend(bundle.network, n_slots=n_slots, max_rows=ROWS))
        self._failing = failing
        self.n_calls = 0

    def _count(self) -> None:
        self.n_calls += 1
        if self._failing(self.n_calls):
            raise OutOfMemory

    def tick(self, *rows: Any) -> Any:
        self._count()
        return super().tick(*rows)

    def tick_tokens(self, *rows: Any) -> Any:
        self._count()
        return super().tick_tokens(*rows)


@pytest.fixture(scope="module")
def bundle(tiny_network: Callable[..., Network]) -> Bundle:
    return tiny_bundle(tiny_network)


@pytest.fixture(scope="module")
def replica(bundle: Bundle) -> Replica:
    return Replica(bundle)


@pytest.mark.parametrize("first", [1, 2, 4])
async def test_it_goes_on_with_fewer_slots_and_the_same_bits(
    bundle: Bundle, replica: Replica, random_episode: Stay, first: int
) -> None:
    backend = Scarce(bundle, 4, lambda call: call == first)
    stays = [random_episode(seed, 20) for seed in range(5)]
    registry = CollectorRegistry()
    async with engine_on(bundle, backend=backend, registry=registry) as engine:
        for _ in range(2):
            scores = await asyncio.gather(*(engine.submit(view_of(stay)) for stay in stays))
            for stay, got in zip(stays, scores, strict=True):
                assert_same_bits(got, replica(stay))
        status = engine.status()
        assert engine.alive()
    assert backend.n_slots == 2
    assert (status.slots_used, status.slots_free, status.slots_lost) == (2, 0, 2)
    assert {slot for tick in backend.ticks[-3:] for slot, _ in tick} <= {0, 1}
    model = {"model": ""}
    assert registry.get_sample_value("llm4ehr_engine_out_of_memory_total", model) == 1


@pytest.mark.parametrize("first", [1, 2, 3, 5])
async def test_both_slot_arrays_go_on_with_fewer_slots(
    tiny_network: Callable[..., Network], random_episode: Stay, first: int
) -> None:
    bundle = tiny_bundle(tiny_network, events="stream", event_window=8)
    backend = Scarce(bundle, 4, lambda call: call == first)
    stays = [random_episode(seed, 20) for seed in range(5)]
    async with engine_on(bundle) as engine:
        expected = await asyncio.gather(*(engine.submit(view_of(stay)) for stay in stays))
    async with engine_on(bundle, backend=backend) as engine:
        for _ in range(2):
            scores = await asyncio.gather(*(engine.submit(view_of(stay)) for stay in stays))
            for got, said in zip(scores, expected, strict=True):
                assert_same_bits(got, said)
    assert backend.n_slots == 2


async def test_without_memory_for_a_single_slot_it_refuses_and_lives_on(
    bundle: Bundle, replica: Replica, random_episode: Stay
) -> None:
    scarce = True
    backend = Scarce(bundle, 4, lambda call: scarce)
    stay = random_episode(1, 20)
    async with engine_on(bundle, backend=backend) as engine:
        with pytest.raises(Overloaded) as refused:
            await engine.submit(view_of(stay))
        assert refused.value.retry_after_s >= 1
        assert backend.n_slots == 1
        with pytest.raises(Overloaded):
            await engine.submit_as_of(view_of(stay))
        assert engine.alive()
        scarce = False
        assert_same_bits(await engine.submit(view_of(stay)), replica(stay))


@pytest.mark.parametrize("fault", [DeviceFault("patient 0815"), SlotError("patient 0815")])
async def test_what_only_a_new_process_can_mend_is_reported_once(
    bundle: Bundle, random_episode: Stay, fault: Exception
) -> None:
    backend = Gate(TorchCpuBackend(bundle.network, n_slots=2, max_rows=ROWS))
    backend.fault = fault
    reported: list[BaseException] = []
    async with engine_on(bundle, backend=backend, on_fatal=reported.append) as engine:
        with pytest.raises(EngineStopped):
            await engine.submit(view_of(random_episode(1, 20)))
        assert not engine.alive()
    assert reported == [fault]


async def test_stopping_is_no_fault(bundle: Bundle) -> None:
    reported: list[BaseException] = []
    engine = engine_of(bundle, on_fatal=reported.append)
    engine.start()
    engine.close()
    assert reported == []


async def test_every_tick_takes_its_turn(bundle: Bundle, random_episode: Stay) -> None:
    class Turn:
        taken = 0
        inside = False

        def __enter__(self) -> None:
            Turn.taken, Turn.inside = Turn.taken + 1, True

        def __exit__(self, *_: object) -> None:
            Turn.inside = False

    class Watched(Gate):
        def tick(self, *rows: Any) -> Any:
            assert Turn.inside
            return super().tick(*rows)

    backend = Watched(TorchCpuBackend(bundle.network, n_slots=2, max_rows=ROWS))
    async with engine_on(bundle, backend=backend, turn=Turn) as engine:
        await engine.submit(view_of(random_episode(1, 20)))
    assert Turn.taken == len(backend.ticks) > 0
    assert not Turn.inside


async def test_more_stays_than_slots(bundle: Bundle, random_episode: Stay) -> None:
    stays = [random_episode(seed, 10 + 3 * seed) for seed in range(9)]
    registry = CollectorRegistry()
    async with engine_on(bundle, n_slots=2, registry=registry) as engine:
        for n in (8, 10, 10_000):
            futures = [engine.submit(view_of(until(s, min(n, s.n_hours)), seq=n)) for s in stays]
            for stay, scores in zip(stays, await asyncio.gather(*futures), strict=True):
                assert_same_bits(scores, Replica(bundle)(until(stay, min(n, stay.n_hours))))

        def metric(name: str, **labels: str) -> float | None:
            return registry.get_sample_value(name, {"model": "", **labels})

        assert metric("llm4ehr_kv_evictions_total") >= 7  # the first round alone
        assert metric("llm4ehr_engine_rows_total", cause="new") == sum(s.n_hours for s in stays)
        assert metric("llm4ehr_engine_rows_total", cause="rebuild") > 0
        assert metric("llm4ehr_kv_slots", state="used") == 2
        assert metric("llm4ehr_engine_pending_stays") == 0


async def test_states_are_bounded(bundle: Bundle, random_episode: Stay) -> None:
    stays = [random_episode(seed, 4) for seed in range(6)]
    async with engine_on(bundle, max_state_bytes=20_000) as engine:
        for stay in (*stays, *stays):
            assert_same_bits(await engine.submit(view_of(stay)), Replica(bundle)(stay))
            assert engine.status().stays < len(stays)
        assert engine.status().stays > 1
        futures = [engine.submit(view_of(stay)) for stay in stays]
        for stay, scores in zip(stays, await asyncio.gather(*futures), strict=True):
            assert_same_bits(scores, Replica(bundle)(stay))
