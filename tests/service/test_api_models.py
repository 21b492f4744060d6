"""Routes of the models, with engines that are made up: states, refusals, the description."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from service.api import model_schemas as schemas
from service.models.version import LoadError, Name
from service.settings import Settings
from tests.service.fakes import BUNDLE, Client, hr, stamp
from tests.service.shelf import ONE, House, housed
from tests.service.test_api_problems import assert_problem

pytestmark = pytest.mark.anyio


@pytest.fixture
async def house(log_path: Path, anyio_backend: str) -> AsyncIterator[House]:
    async with housed(log_path) as house:
        yield house


async def test_models_cannot_be_changed_unless_it_is_allowed(client: Client) -> None:
    for verb in ("load", "activate", "unload"):
        response = await client.http.post(f"{ONE}/1/{verb}")
        assert_problem(response, "model-control-disabled")
    assert_problem(
        await client.http.put("/models/shadow", json={"model": "llm4ehr/2"}),
        "model-control-disabled",
    )
    assert_problem(await client.http.delete("/models/shadow"), "model-control-disabled")
    assert Settings().model_control is False
    body = (await client.http.get("/models")).json()
    assert [v["state"] for v in body["versions"]] == ["active"]


async def test_the_life_of_a_version(house: House) -> None:
    await house.post(admitted_at=stamp(0), observations=[hr(80)])
    states = {(v["name"], v["version"]): v["state"] for v in (await listed(house))["versions"]}
    assert states[("llm4ehr", "1")] == "active"
    assert states[("llm4ehr", "2")] == states[("other", "1")] == "available"
    house.shelf.gate.clear()
    response = await house.control(2, "load")
    assert (response.status_code, response.headers["location"]) == (202, f"{ONE}/2")
    assert response.json()["state"] == "loading"
    assert (await house.control(2, "load")).json()["state"] == "loading"  # once is enough
    assert_problem(await house.control(2, "activate"), "model-not-ready")
    assert_problem(await house.control(2, "unload"), "model-not-ready")
    assert_problem(await house.risk(model_version="2"), "model-not-loaded")
    assert (await house.risk()).status_code == 200  # loading holds nobody up
    house.shelf.gate.set()
    ready = await house.until(2, "ready")
    assert ready["digest"] == "2l" * 32
    assert ready["progress"] == {"scored": 1, "total": 1, "behind": 0, "failed": 0}
    assert (await house.control(2, "activate")).json()["state"] == "active"
    assert (await house.risk()).json()["provenance"]["digest"] == "2l" * 32
    assert (await house.state(1))["state"] == "ready"
    assert (await listed(house))["active"] == "llm4ehr/2"
    assert 'digest="' + "2l" * 32 in (await house.http.get("/metrics")).text
    assert BUNDLE.digest not in (await house.http.get("/metrics")).text
    summary = (await house.http.get("/operator/summary")).json()
    assert summary["model"]["version"] == "2"
    assert_problem(await house.control(2, "unload"), "model-active")
    await house.control(1, "activate")
    await house.control(2, "unload")
    assert (await house.until(2, "available"))["progress"] is None
    assert house.shelf.closed == [Name("llm4ehr", 2)]


async def listed(house: House) -> dict[str, Any]:
    body: dict[str, Any] = (await house.http.get("/models")).json()
    return body


async def test_failures_are_told_and_harm_nobody(house: House) -> None:
    house.shelf.fault = LoadError("not-streamable", "this network reads later hours")
    await house.control(2, "load")
    failed = await house.until(2, "failed")
    assert failed["failure"] == {
        "type": "not-streamable",
        "detail": "this network reads later hours",
    }
    house.shelf.fault = RuntimeError("the secret 4711")
    await house.control(2, "load")
    assert (await house.until(2, "failed"))["failure"] == {
        "type": "backend-failed",
        "detail": "RuntimeError",
    }
    house.shelf.fault = None
    engine = await house.ready(2)
    await house.http.put("/models/shadow", json={"model": "llm4ehr/2"})
    engine.is_alive = False
    assert (await house.state(2))["failure"]["type"] == "engine-stopped"
    assert_problem(await house.control(2, "activate"), "model-not-loaded")
    assert (await listed(house))["shadow"] is None
    await house.post(admitted_at=stamp(0), observations=[hr(80)])
    assert (await house.risk()).status_code == 200
    assert engine.submitted == []
    await house.ready(2)


async def test_only_so_many_are_loaded(house: House) -> None:
    await house.ready(2)
    await house.ready(3)
    assert_problem(await house.control(4, "load"), "too-many-models")
    await house.control(3, "unload")
    await house.until(3, "available")
    await house.ready(4)


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        (f"{ONE}/9/load", "model-unknown"),
        ("/models/llm/versions/1/load", "model-unknown"),
        (f"{ONE}/3/activate", "model-not-loaded"),
        (f"{ONE}/3/unload", "model-not-loaded"),
        (f"{ONE}/0/load", "invalid-request"),
        (f"{ONE}/x/load", "invalid-request"),
        (f"{ONE}/1/drop", "not-found"),
    ],
)
async def test_versions_that_are_not_there(house: House, path: str, problem: str) -> None:
    assert_problem(await house.http.post(path), problem)


async def test_trials_that_cannot_be(house: House) -> None:
    for body in ({}, {"model": "llm4ehr"}, {"model": "../x/1"}, {"model": "llm4ehr/2", "x": 1}):
        response = await house.http.put("/models/shadow", json=body)
        assert_problem(response, "invalid-request")
    response = await house.http.put("/models/shadow", json={"model": "llm4ehr/2"})
    assert_problem(response, "model-not-loaded")


async def test_another_model_can_be_loaded_and_pinned(house: House) -> None:
    await house.post(admitted_at=stamp(0), observations=[hr(80)])
    await house.ready(1, "other")
    body = (await house.risk(model_version="other/1")).json()
    assert body["provenance"]["model"] == "other"
    assert (await house.risk(model_version="1")).json()["provenance"]["model"] == "llm4ehr"


async def test_writes_are_scored_by_the_active_model_at_once_and_by_the_others_behind(
    house: House,
) -> None:
    second = await house.ready(2)
    house.engine.held = second.held = True
    await house.post(admitted_at=stamp(0), observations=[hr(80)])
    assert [s[:2] for s in house.engine.submitted] == [("e", 2)]
    await house.settle()
    assert [s[:2] for s in second.submitted] == [("e", 2)]
    for engine in (house.engine, second):
        engine.held = False
        engine.release()
    await house.settle()
    await house.http.delete("/episodes/e")
    assert house.engine.forgotten == second.forgotten == ["e"]


async def test_the_protocol_of_platforms_lists_versions_and_their_readiness(house: House) -> None:
    engine = await house.ready(2)
    body = (await house.http.get("/v2/models/llm4ehr")).json()
    assert (body["versions"], body["parameters"]["digest"]) == (["1", "2"], BUNDLE.digest)
    second = (await house.http.get("/v2/models/llm4ehr/versions/2")).json()
    assert second["parameters"]["digest"] == "2l" * 32
    path = "/v2/models/llm4ehr/versions/2/ready"
    assert (await house.http.get(path)).status_code == 200
    engine.is_alive = False
    assert (await house.http.get(path)).status_code == 503
    assert (await house.http.get("/v2/models/llm4ehr/ready")).status_code == 200
    assert (await house.http.get("/v2/models/other")).status_code == 404
    assert (await house.http.get("/v2/models/llm4ehr/versions/3")).status_code == 404


async def test_answers_and_examples_are_as_described(house: House) -> None:
    await house.ready(2)
    await house.http.put("/models/shadow", json={"model": "llm4ehr/2"})
    schemas.ModelsOut.model_validate_json((await house.http.get("/models")).text)
    document = (await house.http.get("/openapi.json")).json()
    one = "/models/{name}/versions/{version}"
    for method, path, status, model in (
        ("get", "/models", "200", schemas.ModelsOut),
        ("get", one, "200", schemas.VersionOut),
        ("post", f"{one}/load", "202", schemas.VersionOut),
        ("post", f"{one}/activate", "200", schemas.VersionOut),
        ("post", f"{one}/unload", "202", schemas.VersionOut),
        ("put", "/models/shadow", "200", schemas.ShadowOut),
    ):
        described = document["paths"][path][method]["responses"][status]
        example = described["content"]["application/json"]["example"]
        TypeAdapter(model).validate_json(json.dumps(example))
