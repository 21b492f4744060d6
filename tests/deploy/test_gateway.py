"""Gateway, two replicas and PostgreSQL as real processes: who gets in, and what survives."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from tests.deploy.programs import program, until
from tests.deploy.stack import ORGANISATION, Prometheus, Stack
from tests.postgres import new_database

pytestmark = pytest.mark.slow

ADMITTED = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=6)


@pytest.fixture(scope="module")
def log_url(postgres_server: str) -> Iterator[str]:
    yield from new_database(postgres_server)


@pytest.fixture(scope="module")
def stack(
    tmp_path_factory: pytest.TempPathFactory, repository: Path, log_url: str
) -> Iterator[Stack]:
    program("nginx")
    with Stack(tmp_path_factory.mktemp("stack"), repository, log_url) as running:
        yield running


@pytest.fixture(scope="module")
def feed(stack: Stack) -> Iterator[httpx.Client]:
    with stack.client() as http:
        yield http


def items(*numbers: int) -> dict[str, Any]:
    """A body that admits a stay, and records heart rates with these ids."""
    observations = [
        {"id": f"hr-{n}", "variable": "hr", "value": 60 + n % 60,
         "time": (ADMITTED + timedelta(minutes=n)).isoformat()}
        for n in numbers
    ]  # fmt: skip
    return {"admitted_at": ADMITTED.isoformat(), "observations": observations}


def test_all_hours_of_a_stay_go_to_one_replica(stack: Stack, feed: httpx.Client) -> None:
    at = [0, 0]
    for n in range(40):
        before = stack.answered()
        for _ in range(3):
            assert feed.get(f"/episodes/nobody-{n}/risk").status_code == 404
        more = [after - b for after, b in zip(stack.answered(), before, strict=True)]
        assert sorted(more) == [0, 3]
        at[more.index(3)] += 1
    assert min(at) > 0, "one replica has all stays"


def test_the_id_alone_decides_however_it_is_written(stack: Stack, feed: httpx.Client) -> None:
    before = stack.answered()
    for path in ("icu-7/risk", "icu-7", "icu%2D7/risk?hours=1", "%69cu-7/embeddings"):
        url = feed.base_url.copy_with(raw_path=f"/episodes/{path}".encode())
        assert feed.get(url).status_code in (404, 422)
    assert 0 in [after - b for after, b in zip(stack.answered(), before, strict=True)]


def test_what_is_posted_is_readable_and_says_who_asked(stack: Stack, feed: httpx.Client) -> None:
    ours = {"X-Request-ID": "ward-17.b"}
    posted = feed.post("/episodes/icu-1/observations", json=items(1, 2), headers=ours)
    assert posted.status_code == 200, posted.text
    assert posted.headers["X-Request-ID"] == "ward-17.b"
    read = feed.get("/episodes/icu-1/risk", params={"min_seq": posted.json()["seq"]})
    assert read.status_code == 200
    # One id in the log of the gateway, in that of the service and in the answer.
    until(lambda: read.headers["X-Request-ID"] in stack.gateway.access_log)
    assert read.json()["hours"][-1]["mortality"] is not None
    assert feed.get(
        "/episodes/icu-1/risk", headers={"If-None-Match": read.headers["ETag"]}
    ).status_code == 304  # fmt: skip
    for answer in (posted, read):
        for name in ("Strict-Transport-Security", "X-Content-Type-Options", "Cache-Control"):
            assert len(answer.headers.get_list(name)) == 1, name


def test_a_certificate_says_who_a_client_is(stack: Stack) -> None:
    certificate = stack.gateway.authority.client("monitor-1")
    with stack.gateway.client(certificate) as monitor:
        posted = monitor.post("/episodes/icu-2/observations", json=items(1))
        assert posted.status_code == 200, posted.text
        # It may record, and not read.
        assert monitor.get("/episodes/icu-2/risk").status_code == 403


def test_a_certificate_of_nobody_known_opens_nothing(stack: Stack) -> None:
    certificate = stack.gateway.authority.client("monitor-2")
    with stack.gateway.client(certificate) as unknown:
        assert unknown.get("/episodes").status_code == 401


def test_a_certificate_of_another_authority_is_refused_at_the_gate(stack: Stack) -> None:
    certificate = stack.gateway.stranger.client("monitor-1")
    before = stack.answered()
    with stack.gateway.client(certificate) as stranger:
        assert stranger.put("/episodes/icu-3", json=items()).status_code == 400
    assert stack.answered() == before


@pytest.mark.parametrize(
    "name", ["X-Client-Subject", "x-client-subject", "X_Client_Subject", "X-Client-Verify"]
)
def test_nobody_can_say_so_himself(stack: Stack, name: str) -> None:
    secret = stack.gateway.secret_file.read_text()
    lies = [
        (name, f"CN=monitor-1,O={ORGANISATION}"),
        ("X-Client-Verify", "SUCCESS"),
        ("X-Gateway-Secret", secret),
        ("Connection", f"close, {name}"),
    ]
    with stack.gateway.client() as nobody:
        answer = nobody.post("/episodes/icu-4/observations", json=items(1), headers=lies)
    assert answer.status_code == 401


def test_nobody_can_say_where_he_is(stack: Stack, feed: httpx.Client, log_url: str) -> None:
    lies = {"X-Forwarded-For": "203.0.113.9", "Forwarded": "for=203.0.113.9"}
    feed.post("/episodes/icu-5/observations", json=items(1), headers=lies).raise_for_status()
    with psycopg.connect(log_url) as db:
        records = [str(row[0]) for row in db.execute("SELECT record FROM audit")]
    about = [record for record in records if "icu-5" in record]
    assert about
    assert all('"127.0.0.1"' in record and "203.0.113.9" not in record for record in about)


def test_without_credentials_only_health_is_told(stack: Stack) -> None:
    with stack.gateway.client() as nobody:
        assert nobody.get("/v2/health/ready").status_code == 200
        assert nobody.get("/episodes").status_code == 401
        assert nobody.get("/models").status_code == 401


def test_metrics_are_for_the_inside(stack: Stack) -> None:
    key = {"Authorization": f"Bearer {stack.keys['metrics']}"}
    with stack.gateway.client(headers=key) as http:
        assert http.get("/metrics").status_code == 404
        assert http.get("/operator/summary").status_code == 404
    assert stack.replicas[0].http.get("/metrics", headers=key).status_code == 200


def test_writes_survive_a_replica_that_is_killed(stack: Stack, feed: httpx.Client) -> None:
    """A writer to eight stays goes on while a replica is killed, stays away, and comes back."""
    acknowledged: dict[str, list[int]] = {f"busy-{n}": [] for n in range(8)}
    failed: list[int] = []
    stop = threading.Event()

    def write() -> None:
        with stack.client() as http:
            for number in range(1, 5_000):
                for name, numbers in acknowledged.items():
                    if stop.is_set():
                        return
                    answer = http.post(f"/episodes/{name}/observations", json=items(number % 300))
                    if answer.status_code == 200:
                        numbers.append(number % 300)
                    else:
                        failed.append(answer.status_code)

    def everybody_wrote(since: dict[str, int]) -> bool:
        return all(len(acknowledged[name]) > n for name, n in since.items())

    def now() -> dict[str, int]:
        return {name: len(numbers) for name, numbers in acknowledged.items()}

    writer = threading.Thread(target=write)
    writer.start()
    victim = stack.replicas[0]
    try:
        until(lambda: everybody_wrote(dict.fromkeys(acknowledged, 2)))
        victim.kill()
        since = now()
        until(lambda: everybody_wrote(since))
        before_return = now()
        victim.start()
        victim.wait_until_ready()
        until(lambda: everybody_wrote(before_return))
    finally:
        stop.set()
        writer.join()
    assert not failed, "a request failed that the other replica could have served"
    for name, numbers in acknowledged.items():
        again = feed.post(f"/episodes/{name}/observations", json=items(*sorted(set(numbers))))
        assert again.json()["accepted"] == 0, "an acknowledged item was not there"
        assert again.json()["seq"] == 1 + len(set(numbers)), "an item was recorded twice"


def test_prometheus_sees_both_replicas_and_judges_the_rules(stack: Stack, tmp_path: Path) -> None:
    ports = [replica.port for replica in stack.replicas]
    with Prometheus(tmp_path, ports, stack.keys["metrics"]) as prometheus:
        until(lambda: prometheus.values('up{job="llm4ehr"}') == [1, 1])
        until(lambda: prometheus.values("llm4ehr_log_available") == [1, 1])
        until(lambda: bool(prometheus.values("llm4ehr:errors:ratio5m")))
        until(lambda: {rule["health"] for rule in prometheus.rules()} == {"ok"})
        assert len(prometheus.rules()) > 20
        pages = [a for a in prometheus.get("alerts")["alerts"] if a["state"] == "firing"]
        assert not [a for a in pages if a["labels"]["severity"] == "page"]
        victim = stack.replicas[1]
        victim.kill()
        down = f'ALERTS{{alertname="ReplicaDown",instance="127.0.0.1:{victim.port}"}}'
        until(lambda: prometheus.values(down) == [1])
        victim.start()
        victim.wait_until_ready()
        until(lambda: prometheus.values(down) == [])
