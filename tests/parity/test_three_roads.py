"""One stay, three roads: streamed through the service, scored whole, scored by the batch job."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.testing import assert_allclose

from llm4ehr.bundle import Bundle, Network, load_bundle
from llm4ehr.episode import Episode, featurise
from llm4ehr.offline import TOLERANCE, score_episodes
from llm4ehr.store import EpisodeStore
from service.__main__ import main
from service.core import EpisodeView
from service.engine.backends.torch_cpu import TorchCpuBackend
from service.log import SqliteLog
from service.replay import DEMO_STORE
from tests.online import save_tiny
from tests.streaming import VISIT, service_of, sorted_items, stream

REPOSITORY = Path(__file__).parents[2] / "model_repository"
NAMES = {
    "decompensation": "decompensation",
    "mortality": "mortality",
    "remaining_los": "remaining_los_hours",
}
ENDS = {"low": "remaining_los_low_hours", "high": "remaining_los_high_hours"}


@pytest.fixture(scope="module", params=["tiny/1", "llm4ehr/1"])
def repository_and_name(
    request: pytest.FixtureRequest,
    tiny_network: Callable[..., Network],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, str]:
    if request.param == "tiny/1":
        repository = tmp_path_factory.mktemp("repository")
        save_tiny(tiny_network, repository)
        return repository, request.param
    if not (REPOSITORY / request.param).is_dir():
        pytest.skip("there is no default bundle in model_repository/llm4ehr/1")
    return REPOSITORY, request.param


@pytest.fixture(scope="module")
def bundle(repository_and_name: tuple[Path, str]) -> Bundle:
    repository, name = repository_and_name
    return load_bundle(repository, name.partition("/")[0], 1)


@pytest.fixture(scope="module")
def stays() -> dict[str, Episode]:
    return {record.episode.episode_id: record.episode for record in EpisodeStore.open(DEMO_STORE)}


Road = dict[str, np.ndarray]
"""Answers of one stay by column: [T], `embedding` [T, H]. NaN where no answer is shown."""

Roads = dict[str, Road]


@dataclass(frozen=True)
class Streamed:
    """What the service made of the stays."""

    views: dict[str, EpisodeView]
    roads: Roads


@pytest.fixture(scope="module")
def streamed(
    bundle: Bundle, stays: dict[str, Episode], tmp_path_factory: pytest.TempPathFactory
) -> Streamed:
    """Every stay through the service, with far fewer slots than stays."""
    return asyncio.run(_stream(bundle, stays, tmp_path_factory.mktemp("log") / "log.sqlite"))


async def _stream(bundle: Bundle, stays: dict[str, Episode], path: Path) -> Streamed:
    """Hour by hour as JSON over HTTP, and every answer as JSON back."""
    backend = TorchCpuBackend(bundle.network, n_slots=5, max_rows=64)
    async with service_of(bundle, backend, SqliteLog(path)) as (http, service):
        units = {code: info.unit for code, info in EpisodeStore.open(DEMO_STORE).codes.items()}
        await stream(http, stays, units)
        return Streamed(
            views={name: await service.view(VISIT, name) for name in stays},
            roads={name: await _read(http, name, stay.n_hours) for name, stay in stays.items()},
        )


async def _read(http: httpx.AsyncClient, name: str, n_hours: int) -> Road:
    risk, states = [
        json.loads((await http.get(f"/episodes/{name}/{resource}?from=0&to={n_hours - 1}")).text)
        for resource in ("risk", "embeddings")
    ]
    columns: dict[str, dict[int, Any]] = {}
    for hour, state in zip(risk["hours"], states["hours"], strict=True):
        if hour["score_withheld"] is None:
            said = {column: hour[column] for column in NAMES.values()}
            interval = hour["remaining_los_interval_hours"]
            if interval is not None:
                said |= {column: interval[end] for end, column in ENDS.items()}
            said |= {f"phenotype_{key}": p for key, p in hour["phenotypes"].items()}
            for column, value in (said | {"embedding": state["embedding"]}).items():
                if value is not None:  # the bundle has that head
                    columns.setdefault(column, {})[hour["hour"]] = value
    road = {}
    for column, values in columns.items():
        nothing = np.full_like(next(iter(values.values())), np.nan, dtype=np.float64)
        road[column] = np.stack([values.get(hour, nothing) for hour in range(n_hours)])
    return road


@pytest.fixture(scope="module")
def offline(bundle: Bundle, stays: dict[str, Episode]) -> Roads:
    """Plain forward passes over whole stays."""
    roads = {}
    for scores in score_episodes(bundle.network, list(stays.values())):
        answers = scores.answers(bundle.calibration)
        columns = {NAMES[t]: answers[t][:, 0] for t in answers if t in NAMES}
        los = bundle.calibration["remaining_los"]
        if los.interval is not None:
            ends = los.bounds(scores.raw["remaining_los"], np.arange(len(scores.hidden)))
            columns |= {name: x[:, 0] for name, x in zip(ENDS.values(), ends, strict=True)}
        for i, phenotype in enumerate(bundle.phenotypes):
            columns[f"phenotype_{phenotype}"] = answers["phenotyping"][:, i]
        roads[scores.episode_id] = columns | {"embedding": scores.hidden}
    return roads


@pytest.fixture(scope="module")
def batch_file(
    repository_and_name: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What `python -m service score` writes."""
    repository, name = repository_and_name
    out = tmp_path_factory.mktemp("batch") / "predictions.parquet"
    where = ["--data", str(DEMO_STORE), "--out", str(out)]
    which = ["--bundle", name, "--repository", str(repository), "--embeddings"]
    assert main(["score", *where, *which]) == 0
    return out


@pytest.fixture(scope="module")
def batch(batch_file: Path) -> Roads:
    table = pq.read_table(batch_file)
    names = np.array(table["episode_id"].to_pylist())
    columns = {
        name: np.array(table[name].to_pylist())
        for name in table.column_names
        if name not in ("episode_id", "hour")
    }
    return {
        str(name): {key: values[names == name] for key, values in columns.items()}
        for name in dict.fromkeys(names)
    }


def assert_agree(a: Roads, b: Roads) -> None:
    """In all hours that `a` shows."""
    assert a.keys() == b.keys()
    atols = dict.fromkeys([NAMES["remaining_los"], *ENDS.values()], TOLERANCE.hours)
    atols["embedding"] = TOLERANCE.hidden
    for name in a:
        assert a[name].keys() == b[name].keys()
        for column, x in a[name].items():
            assert x.shape == b[name][column].shape
            shown = ~np.isnan(x.reshape(len(x), -1)).any(axis=1)
            atol = atols.get(column, TOLERANCE.probability)
            assert_allclose(
                x[shown], b[name][column][shown], rtol=0, atol=atol, err_msg=f"{name} {column}"
            )


def test_streaming_agrees_with_whole_stays(streamed: Streamed, offline: Roads) -> None:
    assert_agree(streamed.roads, offline)


def test_streaming_agrees_with_the_batch_job(streamed: Streamed, batch: Roads) -> None:
    assert_agree(streamed.roads, batch)


def test_the_batch_job_agrees_with_whole_stays(batch: Roads, offline: Roads) -> None:
    assert_agree(batch, offline)


def test_every_road_gives_every_answer_of_the_bundle(
    bundle: Bundle, streamed: Streamed, offline: Roads, batch: Roads
) -> None:
    heads = bundle.network.model.config.heads
    expected = {NAMES[task] for task in heads if task in NAMES} | {"embedding"}
    expected |= {f"phenotype_{name}" for name in bundle.phenotypes}
    expected |= set(ENDS.values()) if bundle.calibration["remaining_los"].interval else set()
    for roads in (streamed.roads, offline, batch):
        assert all(road.keys() == expected for road in roads.values())


def test_only_hours_before_the_first_data_show_nothing(
    streamed: Streamed, stays: dict[str, Episode]
) -> None:
    for name, stay in stays.items():
        first = int(min(stay.obs_hours.min(), stay.ev_hours.min()))
        for column in streamed.roads[name].values():
            shown = ~np.isnan(column.reshape(len(column), -1)).any(axis=1)
            assert shown.tolist() == [hour >= first for hour in range(stay.n_hours)]


def test_the_comparison_would_notice_a_lost_hour(streamed: Streamed, bundle: Bundle) -> None:
    """The difference that a real mistake makes stands far above the tolerance."""
    for name, road in streamed.roads.items():
        episode = streamed.views[name].episode
        later = replace(episode, obs_hours=episode.obs_hours + 1, ev_hours=episode.ev_hours + 1)
        (moved,) = score_episodes(bundle.network, [replace(later, n_hours=48)])
        worst = np.nanmax(np.abs(moved.hidden - road["embedding"]))
        assert worst > 100 * TOLERANCE.hidden


def test_http_and_json_lose_nothing(
    streamed: Streamed, stays: dict[str, Episode], bundle: Bundle
) -> None:
    """What the service holds is the stored stay, and the features are the same to the last bit."""
    network = bundle.network
    for name, stay in stays.items():
        held = streamed.views[name].episode
        assert held.statics == stay.statics
        assert sorted_items(held) == sorted_items(stay)
        n = stay.n_hours
        ours, theirs = (
            featurise(e, network.vocabulary, network.preprocessing, n) for e in (held, stay)
        )
        for array in ("series", "events", "observed"):
            x, y = getattr(ours, array), getattr(theirs, array)
            assert (x.dtype, x.shape) == (y.dtype, y.shape)
            assert x.tobytes() == y.tobytes()


def test_the_batch_file_says_where_it_comes_from(
    batch_file: Path, bundle: Bundle, stays: dict[str, Episode]
) -> None:
    schema = pq.read_schema(batch_file)
    expected = {
        "model": bundle.name,
        "version": bundle.version,
        "digest": bundle.digest,
        "preprocessing_digest": bundle.network.preprocessing_digest,
    }
    interval = bundle.calibration["remaining_los"].interval
    if interval:
        expected["interval_coverage"] = interval.coverage
    assert json.loads(schema.metadata[b"llm4ehr"]) == expected
    heads = bundle.network.model.config.heads
    columns = ["episode_id", "hour", *(name for task, name in NAMES.items() if task in heads)]
    columns += [*ENDS.values()] if interval else []
    columns += [f"phenotype_{name}" for name in bundle.phenotypes]
    assert schema.names == [*columns, "embedding"]
    table = pq.read_table(batch_file)
    rows = list(zip(table["episode_id"].to_pylist(), table["hour"].to_pylist(), strict=True))
    assert rows == [(name, h) for name, stay in stays.items() for h in range(stay.n_hours)]
