"""The commands a newcomer runs first: the demo, and scoring a store."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest

from llm4ehr.bundle import load_bundle
from llm4ehr.store import EpisodeStore
from service.__main__ import main
from service.replay import DEMO_STORE
from tests.end_to_end.server import PATIENCE_S, Server, environment


def eventually(server: Server, ask: Callable[[], Any]) -> Any:
    """The first answer that is true. What is asked may come at any time, so there is no hurry."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if answer := ask():
            return answer
        time.sleep(0.05)
    raise AssertionError(server.output)


@pytest.mark.slow
def test_the_demo_shows_real_stays_with_changing_risks(repository: Path, tmp_path: Path) -> None:
    stays = {record.episode.episode_id: record.episode for record in EpisodeStore.open(DEMO_STORE)}
    with Server(repository, tmp_path, "--demo", "--seconds-per-hour", "0.05") as server:
        http = server.http
        assert "DEMO" in server.output
        assert "PhysioNet" in server.output
        assert f"curl -s http://127.0.0.1:{server.port}/episodes?sort=risk" in server.output

        def listed() -> list[dict[str, Any]]:
            rows: list[dict[str, Any]] = http.get("/episodes?sort=risk").json()["episodes"]
            return rows if {row["episode_id"] for row in rows} == set(stays) else []

        def risks() -> dict[str, float]:
            rows = {row["episode_id"]: row["risk"] for row in listed()}
            return {} if None in rows.values() else rows

        first = eventually(server, risks)
        assert all(0 <= risk <= 1 for risk in first.values())
        eventually(server, lambda: not risks().items() & first.items())
        # Every stay arrives at its last hour with data, and shows a score for it.
        last = {name: int(_last_hour(stay)) for name, stay in stays.items()}
        eventually(server, lambda: {row["episode_id"]: row["hour"] for row in listed()} == last)
        for name, hour in last.items():
            [shown] = http.get(f"/episodes/{name}/risk").json()["hours"]
            assert shown["hour"] == hour
            assert shown["score_withheld"] is None
            assert 0 <= shown["mortality"] <= 1
        metrics = http.get("/metrics").text
        assert "llm4ehr_kv_slots" in metrics
        assert not any(name in metrics for name in stays)
        assert server.terminate() == 0
        with pytest.raises(httpx.TransportError):
            http.get("/v2/health/live")
    # The log of a demo is its own and does not stay.
    assert not server.log_path.exists()
    assert not any(name in server.output for name in stays)
    assert "Traceback" not in server.output


def _last_hour(stay: Any) -> float:
    hours = np.append(stay.obs_hours, stay.ev_hours)
    return float(np.floor(hours[hours < stay.n_hours].max()))


@pytest.mark.slow
def test_a_demo_ends_with_all_that_belongs_to_it(repository: Path, tmp_path: Path) -> None:
    """A replay that went on would fill whatever service comes next on the port."""
    with Server(repository, tmp_path, "--demo", "--seconds-per-hour", "60") as server:
        eventually(server, lambda: server.http.get("/episodes").json()["episodes"])
        assert server.terminate() == 0
        assert not server.leaves_processes()


@pytest.mark.slow
def test_a_demo_leaves_a_service_that_has_the_port_alone(repository: Path, tmp_path: Path) -> None:
    with Server(repository, tmp_path) as server:
        demo = subprocess.run(
            [sys.executable, "-m", "service", "serve", "--demo"],
            env=environment(repository, port=server.port),
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert demo.returncode != 0
        assert "Traceback" not in demo.stderr
        assert server.http.get("/episodes").json()["episodes"] == []


@pytest.mark.slow
def test_a_store_is_scored_into_one_file(repository: Path, tmp_path: Path) -> None:
    out = tmp_path / "predictions.parquet"
    done = subprocess.run(
        [sys.executable, "-m", "service", "score", "--data", str(DEMO_STORE), "--out", str(out)],
        env=environment(repository),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "576 episode-hours" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    bundle = load_bundle(repository, "tiny", 1)
    schema = pq.read_schema(out)
    assert schema.names == [
        "episode_id", "hour", "decompensation", "mortality", "remaining_los_hours",
        "remaining_los_low_hours", "remaining_los_high_hours",
        "phenotype_sepsis", "phenotype_shock",
    ]  # fmt: skip
    assert json.loads(schema.metadata[b"llm4ehr"]) == {
        "model": "tiny",
        "version": 1,
        "digest": bundle.digest,
        "preprocessing_digest": bundle.network.preprocessing_digest,
        "interval_coverage": 0.8,
    }
    table = pq.read_table(out)
    assert table.num_rows == 576
    for name in schema.names[2:]:
        values = table[name].to_numpy()
        assert np.isfinite(values).all()
        assert (values >= 0).all()
        assert (values <= 1).all() or name.startswith("remaining_los_")
        assert len(set(values.tolist())) > 100


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--data", "nowhere", "--bundle", "tiny/1"], "nowhere"),
        (["--data", str(DEMO_STORE), "--bundle", "tiny/7"], "manifest.json"),
        (["--data", str(DEMO_STORE), "--bundle", "tiny"], "NAME/VERSION"),
    ],
)
def test_what_a_user_can_mend_is_said_in_one_line(
    repository: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    told: str,
) -> None:
    out = tmp_path / "predictions.parquet"
    assert main(["score", *arguments, "--repository", str(repository), "--out", str(out)]) == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert told in line
    assert list(tmp_path.iterdir()) == []
