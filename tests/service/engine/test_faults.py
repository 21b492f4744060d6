"""The engine when something breaks: a model that overflows, a backend that fails, the end."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections.abc import Callable

import pytest
import torch

from llm4ehr.bundle import Bundle, Network
from llm4ehr.episode import Episode, Statics
from service.core import Scores
from service.engine.backends.torch_cpu import TorchCpuBackend
from service.engine.engine import EngineStopped, ModelFault
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


@pytest.fixture
def bundle(tiny_network: Make) -> Bundle:
    return tiny_bundle(tiny_network)


def overflows_for_the_tall(bundle: Bundle) -> None:
    """The weight of the height is finite and far too large; without a height it meets a zero."""
    height = bundle.network.preprocessing.n_series - 11
    with torch.no_grad():
        bundle.network.model.series_encoder.series[0].weight[:, height] = 3e38


def tall(make: Stay, episode_id: str = "tall", height: float | None = 182.0) -> Episode:
    observations = [("hr", h + 0.5, 70.0 + h) for h in range(20)]
    return make(observations, episode_id=episode_id, n_hours=20, statics=Statics(height_cm=height))


async def test_a_fault_concerns_its_own_stay(
    bundle: Bundle, make_episode: Stay, random_episode: Stay
) -> None:
    overflows_for_the_tall(bundle)
    replica = Replica(bundle)
    sound = [random_episode(seed, 20) for seed in range(3)]
    async with engine_on(bundle, n_slots=2) as engine:
        faulty = engine.submit(view_of(tall(make_episode)))
        futures = [engine.submit(view_of(stay)) for stay in sound]
        with pytest.raises(ModelFault) as caught:
            await faulty
        assert "182" not in str(caught.value)
        for stay, scores in zip(sound, await asyncio.gather(*futures), strict=True):
            assert_same_bits(scores, replica(stay))
        assert engine.alive()
        with pytest.raises(ModelFault):
            await engine.submit_as_of(view_of(tall(make_episode)))
        # The slots that held the fault serve others, and the stay itself once it is mended.
        for stay in (*sound, tall(make_episode, height=None)):
            assert_same_bits(await engine.submit(view_of(stay)), replica(stay))


async def test_nan_weights_fail_every_stay_and_stop_nothing(
    bundle: Bundle, make_episode: Stay
) -> None:
    with torch.no_grad():
        bundle.network.model.series_encoder.series[2].bias[0] = math.nan
    async with engine_on(bundle) as engine:
        for _ in range(2):
            with pytest.raises(ModelFault):
                await engine.submit(view_of(tall(make_episode)))
        assert engine.alive()


@pytest.mark.parametrize("task", ["mortality", "phenotyping"])
async def test_a_head_that_gives_nan_is_a_fault(
    bundle: Bundle, make_episode: Stay, task: str
) -> None:
    with torch.no_grad():
        bundle.network.model.heads[task].bias[-1] = math.nan
    async with engine_on(bundle) as engine:
        with pytest.raises(ModelFault):
            await engine.submit(view_of(tall(make_episode)))


class _Broken(BaseException):
    """Not even an Exception."""


@pytest.mark.parametrize("fault", [RuntimeError("patient 0815"), _Broken("patient 0815")])
async def test_a_dead_engine_answers_everyone_and_says_so(
    bundle: Bundle,
    make_episode: Stay,
    caplog: pytest.LogCaptureFixture,
    fault: BaseException,
) -> None:
    gate = Gate(TorchCpuBackend(bundle.network, n_slots=2, max_rows=ROWS))
    async with engine_on(bundle, backend=gate) as engine:
        await engine.submit(view_of(tall(make_episode, "z")))
        assert engine.alive()
        gate.open.clear()
        futures = [engine.submit(view_of(tall(make_episode, name))) for name in "abcdef"]
        futures.append(engine.submit_as_of(view_of(tall(make_episode, "z"))))
        gate.fault = fault
        with caplog.at_level(logging.CRITICAL):
            gate.open.set()
            outcomes = await asyncio.wait_for(
                asyncio.gather(*futures, return_exceptions=True), timeout=60
            )
        assert [type(outcome) for outcome in outcomes] == [EngineStopped] * 7
        assert not engine.alive()
        for submit in (engine.submit, engine.submit_as_of):
            with pytest.raises(EngineStopped):
                submit(view_of(tall(make_episode)))
        engine.forget("a")
    assert type(fault).__name__ in caplog.text
    assert "0815" not in caplog.text


async def test_closing_answers_everyone(bundle: Bundle, make_episode: Stay) -> None:
    gate = Gate(TorchCpuBackend(bundle.network, n_slots=2, max_rows=ROWS))
    async with engine_on(bundle, backend=gate) as engine:
        done = await engine.submit(view_of(tall(make_episode, "done")))
        gate.open.clear()
        futures = [engine.submit(view_of(tall(make_episode, name))) for name in "abc"]
        threading.Timer(0.05, gate.open.set).start()
        engine.close()
        outcomes = await asyncio.gather(*futures, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {EngineStopped}
        assert not engine.alive()
        with pytest.raises(EngineStopped):
            engine.submit(view_of(tall(make_episode)))
        engine.close()
    assert len(done.hours) == 20


async def test_an_engine_that_was_not_started_takes_nothing(
    bundle: Bundle, make_episode: Stay
) -> None:
    engine = engine_of(bundle)
    assert not engine.alive()
    with pytest.raises(EngineStopped):
        engine.submit(view_of(tall(make_episode)))
    engine.close()


def test_a_caller_may_be_gone_with_its_loop(bundle: Bundle, make_episode: Stay) -> None:
    gate = Gate(TorchCpuBackend(bundle.network, n_slots=2, max_rows=ROWS))
    engine = engine_of(bundle, backend=gate)
    engine.start()

    async def leave() -> None:
        gate.open.clear()
        engine.submit(view_of(tall(make_episode, "left")))

    async def ask() -> Scores:
        gate.open.set()
        return await engine.submit(view_of(tall(make_episode, "asked")))

    asyncio.run(leave())
    assert len(asyncio.run(ask()).hours) == 20
    assert engine.alive()
    engine.close()
