"""Train and serve featurise alike: real stays from the extraction, streamed through the service."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llm4ehr.bundle import Network
from llm4ehr.episode import Episode, event_tokens, featurise
from llm4ehr.store import EpisodeStore
from service.core import EpisodeView
from service.engine.backends.torch_cpu import TorchCpuBackend
from service.log import SqliteLog
from tests.online import tiny_bundle
from tests.streaming import VISIT, service_of, sorted_items, stream
from training.config import PreprocessingOptions, SourceConfig
from training.data.prepare import prepare
from training.dataset import fit_preprocessing
from training.sources import open_sources

SOURCES = {"eicu": "eicu-demo-2.0.1", "mimic3": "mimic-iii-demo-1.4"}
N_STAYS = 8


@pytest.fixture(scope="module", params=sorted(SOURCES))
def store(
    request: pytest.FixtureRequest, llm4ehr_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> EpisodeStore:
    source = llm4ehr_data / SOURCES[request.param]
    if not source.is_dir():
        pytest.skip(f"LLM4EHR_DATA holds no {source.name}")
    path = tmp_path_factory.mktemp("stores") / request.param
    prepare(request.param, source, path, progress=False)
    return EpisodeStore.open(path)


@pytest.fixture(scope="module")
def stays(store: EpisodeStore) -> dict[str, Episode]:
    """Spread over the store, of one to four days, with events."""
    fit = [
        record.episode
        for record in store
        if 24 <= record.episode.n_hours <= 96 and len(record.episode.ev_value) >= 20
    ]
    chosen = fit[:: max(len(fit) // N_STAYS, 1)][:N_STAYS]
    assert len(chosen) == N_STAYS
    return {episode.episode_id: episode for episode in chosen}


@pytest.fixture(scope="module")
def views(
    stays: dict[str, Episode],
    store: EpisodeStore,
    tiny_network: Callable[..., Network],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, EpisodeView]:
    """What the service holds of the stays."""

    async def run() -> dict[str, EpisodeView]:
        bundle = tiny_bundle(tiny_network)
        backend = TorchCpuBackend(bundle.network, n_slots=N_STAYS, max_rows=64)
        log = SqliteLog(tmp_path_factory.mktemp("log") / "log.sqlite")
        async with service_of(bundle, backend, log) as (http, service):
            await stream(http, stays, {code: info.unit for code, info in store.codes.items()})
            return {name: await service.view(VISIT, name) for name in stays}

    return asyncio.run(run())


def _posted(stay: Episode) -> Episode:
    """Without the items of the very last minute, in an hour that has not come yet."""
    seen, happened = stay.obs_hours < stay.n_hours, stay.ev_hours < stay.n_hours
    return replace(
        stay,
        obs_variable=stay.obs_variable[seen],
        obs_hours=stay.obs_hours[seen],
        obs_value=stay.obs_value[seen],
        obs_priority=stay.obs_priority[seen],
        ev_code=stay.ev_code[happened],
        ev_hours=stay.ev_hours[happened],
        ev_value=stay.ev_value[happened],
    )


def test_the_service_holds_what_the_extraction_found(
    stays: dict[str, Episode], views: dict[str, EpisodeView]
) -> None:
    for name, stay in stays.items():
        held = views[name].episode
        assert held.statics == stay.statics
        ours, theirs = sorted_items(held), sorted_items(_posted(stay))
        for a, b in zip(ours, theirs, strict=True):
            assert len(a) == len(b)
            for x, y in zip(a, b, strict=True):
                # A time travels in microseconds.
                assert (x[0], *x[2:]) == (y[0], *y[2:])
                assert x[1] == pytest.approx(y[1], abs=1e-9)


def test_features_are_equal_bit_for_bit(
    store: EpisodeStore, stays: dict[str, Episode], views: dict[str, EpisodeView]
) -> None:
    """With the vocabulary and the normalisation of the store, as a model trained on it has them."""
    sources = open_sources([SourceConfig(store=store.path, splits=("pretrain",))], training=True)
    preprocessing, vocabulary = fit_preprocessing(sources, PreprocessingOptions(), 256)
    for name, stay in stays.items():
        n = stay.n_hours
        ours, theirs = (
            featurise(e, vocabulary, preprocessing, n) for e in (views[name].episode, stay)
        )
        assert theirs.observed.any()
        assert theirs.events.any()
        for array in ("series", "events", "observed"):
            assert getattr(ours, array).tobytes() == getattr(theirs, array).tobytes()
        tokens, stored = (
            event_tokens(e, vocabulary, n, preprocessing) for e in (views[name].episode, stay)
        )
        assert np.array_equal(tokens.ids, stored.ids)
        assert np.array_equal(tokens.hours, stored.hours)
