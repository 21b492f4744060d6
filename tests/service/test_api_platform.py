"""What platforms read: health, metadata, metrics, the API description; and the settings."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from llm4ehr import __version__
from service.access.authenticator import Anyone
from service.api import Dependencies, create_app, schemas
from service.log import SqliteLog
from service.settings import Settings
from tests.service.fakes import BUNDLE, Client, Clock, FakeEngine, fake_model, hr, stamp

pytestmark = pytest.mark.anyio


async def test_server_metadata(client: Client) -> None:
    body = (await client.http.get("/v2")).json()
    assert body == {"name": "llm4ehr", "version": __version__, "extensions": []}


async def test_health(client: Client) -> None:
    live, ready = "/v2/health/live", "/v2/health/ready"
    assert (await client.http.get(live)).json() == {"live": True}
    assert (await client.http.get(ready)).json() == {"ready": True}
    client.engine.is_alive = False
    for path in (live, ready, "/v2/models/llm4ehr/ready", "/v2/models/llm4ehr/versions/1/ready"):
        response = await client.http.get(path)
        assert (response.status_code, set(response.json())) == (503, {"error"})
    await client.log.close()
    assert (await client.http.get(ready)).json() == {"error": "the log is unavailable"}


async def test_model_metadata(client: Client) -> None:
    body = (await client.http.get("/v2/models/llm4ehr")).json()
    assert (body["name"], body["versions"]) == ("llm4ehr", ["1"])
    assert body["parameters"]["digest"] == BUNDLE.digest
    assert {o["name"]: o["shape"] for o in body["outputs"]} == {
        "decompensation": [-1],
        "mortality": [-1],
        "remaining_los": [-1],
        "phenotyping": [-1, 1],
    }
    assert (await client.http.get("/v2/models/llm4ehr/versions/1")).json() == body
    assert (await client.http.get("/v2/models/llm4ehr/ready")).json()["ready"] is True
    assert (await client.http.get("/v2/models/llm4ehr/versions/1/ready")).json()["ready"] is True


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/models/other", 404),
        ("GET", "/v2/models/llm4ehr/versions/2", 404),
        ("GET", "/v2/models/other/ready", 404),
        ("GET", "/v2/nothing", 404),
        ("POST", "/v2/models/llm4ehr/infer", 404),
        ("POST", "/v2", 405),
    ],
)
async def test_errors_below_v2_have_the_protocols_form(
    client: Client, method: str, path: str, status: int
) -> None:
    response = await client.http.request(method, path)
    assert (response.status_code, list(response.json())) == (status, ["error"])


async def samples(client: Client) -> dict[str, float]:
    lines = (await client.http.get("/metrics")).text.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


async def test_metrics(client: Client) -> None:
    client.clock.to(5)
    items = [hr(id="a", hours=4.5), hr(id="a", hours=4.5), hr(90, hours=0.5), hr("x")]
    await client.post(
        admitted_at=stamp(0),
        observations=[*items, hr(91, hours=4.5, corrects="a")],
        withdrawals=[{"withdraws": "a"}],
    )
    await client.post(observations=[hr(None)])
    await client.risk()
    await client.http.get("/nowhere")
    await client.http.request("BREW", "/episodes")
    found = await samples(client)
    outcomes = {
        "appended": 1,
        "late": 1,
        "corrected": 1,
        "withdrawn": 1,
        "duplicate": 1,
        "rejected": 2,
    }
    for outcome, n in outcomes.items():
        assert found[f'llm4ehr_observations_total{{outcome="{outcome}"}}'] == n
    assert found['llm4ehr_rejections_total{error="value-missing"}'] == 1
    assert found["llm4ehr_ingest_commit_seconds_count"] == 1

    def requests(method: str, route: str, status: int) -> float:
        labels = f'method="{method}",route="{route}",status="{status}"'
        return found[f"llm4ehr_http_request_duration_seconds_count{{{labels}}}"]

    assert requests("POST", "/episodes/{episode_id}/observations", 200) == 1
    assert requests("POST", "/episodes/{episode_id}/observations", 422) == 1
    assert requests("GET", "/episodes/{episode_id}/risk", 200) == 1
    assert requests("GET", "unmatched", 404) == 1
    assert requests("other", "/episodes", 405) == 1
    [info] = [name for name in found if name.startswith("llm4ehr_build_info")]
    assert BUNDLE.digest in info


async def test_metric_names_have_units_and_no_colons(client: Client) -> None:
    text = (await client.http.get("/metrics")).text
    names = re.findall(r"^# TYPE (\S+) (?:histogram|counter|gauge)$", text, re.MULTILINE)
    assert len(names) >= 5
    for name in names:
        unit = "seconds|hours|ratio|total|created|info|waiting|available"
        assert re.fullmatch(f"llm4ehr_[a-z_]+_({unit})", name), name


async def test_two_apps_share_nothing(tmp_path: Path) -> None:
    logs = [SqliteLog(tmp_path / f"{i}.sqlite") for i in range(2)]
    apps = [
        create_app(
            Settings(),
            Dependencies(log=log, authenticator=Anyone(), model=fake_model(), clock=Clock()),
        )
        for log in logs
    ]
    assert apps[0].state.context.metrics is not apps[1].state.context.metrics
    for log in logs:
        await log.close()


async def test_a_bundle_that_reads_the_future_is_refused(log_path: Path) -> None:
    log = SqliteLog(log_path)
    engine = FakeEngine(replace(BUNDLE, causal=False))
    with pytest.raises(ValueError, match="causal"):
        create_app(
            Settings(), Dependencies(log=log, authenticator=Anyone(), model=fake_model(engine))
        )
    await log.close()


async def test_the_description_is_complete(client: Client) -> None:
    document = (await client.http.get("/openapi.json")).json()
    text = str(document)
    for reference in re.findall(r"#/components/schemas/(\w+)", text):
        assert reference in document["components"]["schemas"], reference
    assert "HTTPValidationError" not in text
    operations = [o for path in document["paths"].values() for o in path.values()]
    ids = {o["operationId"] for o in operations}
    assert len(ids) == len(operations)
    assert ids >= {
        "postObservations",
        "putEpisode",
        "patchEpisode",
        "deleteEpisode",
        "getEpisode",
        "listEpisodes",
        "getRisk",
        "getEmbeddings",
        "getLive",
        "getReady",
        "getModel",
    }
    for operation in operations:
        assert operation["summary"]
        if not operation["operationId"].startswith(
            ("getModel", "getServer", "getLive", "getReady", "getOperator")
        ):
            assert any("4" in status for status in operation["responses"])


ANSWERS = {
    ("post", "/episodes/{episode_id}/observations"): schemas.PostedOut,
    ("get", "/episodes/{episode_id}/risk"): schemas.RiskOut,
    ("get", "/episodes/{episode_id}/embeddings"): schemas.EmbeddingsOut,
    ("get", "/episodes/{episode_id}"): schemas.EpisodeOut,
    ("put", "/episodes/{episode_id}"): schemas.EpisodeOut,
    ("patch", "/episodes/{episode_id}"): schemas.EpisodeOut,
    ("get", "/episodes"): schemas.EpisodeListOut,
}


async def test_the_worked_examples_are_true(client: Client) -> None:
    """Every example validates, and the requests among them are accepted in the order told."""
    document = (await client.http.get("/openapi.json")).json()
    for (method, path), model in ANSWERS.items():
        operation = document["paths"][path][method]
        example = operation["responses"]["200"]["content"]["application/json"]["example"]
        TypeAdapter(model).validate_json(json.dumps(example))

    def request(method: str, path: str) -> dict[str, Any]:
        body = document["paths"][path][method]["requestBody"]["content"]["application/json"]
        return {name: e["value"] for name, e in body["examples"].items()}

    client.clock.to(100)
    first, correction = request("post", "/episodes/{episode_id}/observations").values()
    posted = await client.http.post("/episodes/icu-2041/observations", json=first)
    operation = document["paths"]["/episodes/{episode_id}/observations"]["post"]
    assert posted.json() == operation["responses"]["200"]["content"]["application/json"]["example"]
    corrected = await client.http.post("/episodes/icu-2041/observations", json=correction)
    assert corrected.json()["accepted"] == 2
    for method in ("put", "patch"):
        for body in request(method, "/episodes/{episode_id}").values():
            response = await client.http.request(method, "/episodes/icu-2041", json=body)
            assert response.status_code == 200


@pytest.mark.parametrize("resource", ["risk", "embeddings"])
async def test_the_description_names_the_headers_of_a_poll(client: Client, resource: str) -> None:
    document = (await client.http.get("/openapi.json")).json()
    parameters = document["paths"][f"/episodes/{{episode_id}}/{resource}"]["get"]["parameters"]
    where = {p["name"]: (p["in"], p.get("required", False)) for p in parameters}
    assert where["If-None-Match"] == where["Prefer"] == ("header", False)
    assert where["hour"] == ("query", False)
    assert len(where) == len(parameters)


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM4EHR_PORT", "9000")
    monkeypatch.setenv("LLM4EHR_STALENESS_LIMIT_HOURS", "none")
    monkeypatch.setenv("LLM4EHR_SCORING_ENABLED", "false")
    monkeypatch.setenv("LLM4EHR_DATA", "elsewhere")
    monkeypatch.setenv("LLM4EHR_TEST_ANYTHING", "1")
    settings = Settings()
    assert (settings.port, settings.staleness_limit, settings.scoring_enabled) == (
        9000,
        None,
        False,
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LLM4EHR_PROT", "8000"),
        ("llm4ehr_prot", "8000"),
        ("LLM4EHR_DATABASE", "x"),
        ("LLM4EHR_PORT", "http"),
        ("LLM4EHR_BUNDLE", "llm4ehr"),
        ("LLM4EHR_BUNDLE", "../x/1"),
        ("LLM4EHR_MAX_ITEMS", "0"),
        ("LLM4EHR_STALENESS_LIMIT_HOURS", "0"),
        ("LLM4EHR_ALLOWED_LATENESS_HOURS", "nan"),
    ],
)
def test_mistaken_settings_are_errors(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError):
        Settings()


def test_unknown_arguments_are_errors() -> None:
    with pytest.raises(ValidationError):
        Settings(prot=1)  # type: ignore[call-arg]
