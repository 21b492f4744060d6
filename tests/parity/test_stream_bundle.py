"""A bundle with events as a second stream: scored in batches and online alike."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient
from numpy.testing import assert_allclose

from llm4ehr.bundle import Network, load_bundle, save_bundle
from llm4ehr.calibration import default_calibration
from llm4ehr.episode import Episode
from llm4ehr.offline import TOLERANCE, score_episodes
from llm4ehr.store import EpisodeStore
from service.batch import score_store
from service.replay import admission, hourly_bodies
from service.runtime import build_app
from service.settings import Settings


@pytest.fixture(scope="module")
def repository(
    tiny_network: Callable[..., Network], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    network = tiny_network(events="stream", event_window=8)
    folder = tmp_path_factory.mktemp("repository")
    calibration = default_calibration(list(network.model.config.heads))
    save_bundle(
        folder, "stream", 1, network, calibration=calibration, labels={}, metrics={}, card="# S\n"
    )
    return folder


def test_it_is_scored_in_batches(repository: Path, store_2012: Path, tmp_path: Path) -> None:
    bundle = load_bundle(repository, "stream", 1)
    score_store(store_2012, tmp_path / "scores.parquet", bundle, embeddings=True)
    table = pq.read_table(tmp_path / "scores.parquet")
    made = np.stack(table["embedding"].to_numpy())
    episodes = [record.episode for record in EpisodeStore.open(store_2012)]
    expected = np.concatenate([s.hidden for s in score_episodes(bundle.network, episodes)])
    assert made.shape[1] == 32
    assert_allclose(made, expected, rtol=0, atol=TOLERANCE.hidden)


def test_the_service_streams_it(
    repository: Path, tmp_path: Path, random_episode: Callable[..., Episode]
) -> None:
    bundle = load_bundle(repository, "stream", 1)
    stay = random_episode(3, 30)
    settings = Settings(
        model_repository=repository,
        bundle="stream/1",
        log_path=tmp_path / "log.sqlite",
        authentication="open",
        staleness_limit_hours=None,
        kv_memory_mib=4,
    )
    units = {"LOINC/2160-0": "mg/dL", "LOINC/2524-7": "mmol/L", "SNOMED/40617009": None}
    with TestClient(build_app(settings), base_url="http://localhost") as http:
        admitted_at = datetime.now(UTC) - timedelta(hours=40)
        http.put("/episodes/s", json=admission(stay, admitted_at)).raise_for_status()
        for _, body in hourly_bodies(stay, admitted_at, units):
            http.post("/episodes/s/observations", json=body).raise_for_status()
        answer = http.get("/episodes/s/embeddings?from=0").json()
    made = np.array([hour["embedding"] for hour in answer["hours"]], np.float32)
    (offline,) = score_episodes(bundle.network, [stay])
    n = len(made)
    assert n >= 25
    assert_allclose(made, offline.hidden[:n], rtol=0, atol=TOLERANCE.hidden)


def test_the_folder_of_backbones_does_not_disturb_the_service(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LLM4EHR_BACKBONES", "backbones")
    Settings()
    monkeypatch.setenv("LLM4EHR_BACKBONE", "backbones")
    with pytest.raises(ValueError, match="unknown environment variables: LLM4EHR_BACKBONE"):
        Settings()
