"""The audit trail as FHIR AuditEvent: valid resources, one for every line."""

from __future__ import annotations

import json
import stat
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

import pytest
from fhir.resources.R4B.auditevent import AuditEvent

from service.__main__ import main
from service.core import to_us
from service.log import EventLog, PostgresLog, SqliteLog
from service.trail.fhir import audit_event
from service.trail.record import Action, AuditRecord, Outcome
from tests.service.fakes import T0, at, hr, running, stamp

pytestmark = pytest.mark.anyio

BALP = "https://profiles.ihe.net/ITI/BALP/StructureDefinition/IHE.BasicAudit."


def record(now: datetime = T0, **changes: Any) -> AuditRecord:
    line = {
        "at_us": to_us(now), "principal": "ward-7", "method": "api-key", "operation": "getRisk",
        "action": "read", "episodes": ("e",), "outcome": "success", "request_id": "r-1",
        "address": "10.1.2.3",
    }  # fmt: skip
    return AuditRecord(**line | changes)


def test_a_read() -> None:
    event = audit_event("w-1", record(), "scores.hospital.example")
    AuditEvent.model_validate(event)
    assert event["meta"]["profile"] == [f"{BALP}Read"]
    assert [s["code"] for s in event["subtype"]] == ["read"]
    assert (event["action"], event["outcome"], event["recorded"]) == ("R", "0", stamp(0))
    client, server = event["agent"]
    assert client["type"]["coding"][0]["code"] == "110153"
    assert client["who"]["identifier"]["value"] == "ward-7"
    assert client["network"] == {"address": "10.1.2.3", "type": "2"}
    assert (client["requestor"], server["requestor"]) == (True, False)
    assert server["network"]["address"] == "scores.hospital.example"
    data, request = event["entity"]
    assert data["what"] == {"type": "Encounter", "identifier": {"value": "e"}}
    assert request["what"]["identifier"]["value"] == "r-1"
    assert request["type"]["code"] == "XrequestId"
    assert {d["type"]: d["valueString"] for d in request["detail"]} == {
        "operation": "getRisk", "authentication": "api-key",
    }  # fmt: skip


@pytest.mark.parametrize("action", get_args(Action))
@pytest.mark.parametrize("outcome", get_args(Outcome))
@pytest.mark.parametrize("episodes", [(), ("e",), ("a", "b")])
@pytest.mark.parametrize("address", ["", "fd00::1"])
def test_every_kind_is_a_valid_resource(
    action: Action, outcome: Outcome, episodes: tuple[str, ...], address: str
) -> None:
    event = audit_event(
        "w-1", record(action=action, outcome=outcome, episodes=episodes, address=address), "s"
    )
    AuditEvent.model_validate(event)
    assert event["outcome"] == {"success": "0", "refused": "4", "failed": "8"}[outcome]
    claimed = event.get("meta", {}).get("profile", [])
    fits = outcome == "success" and action != "execute" and episodes == ("e",) and address != ""
    assert claimed == ([BALP + action.capitalize()] if fits else [])


def test_a_list_is_a_search() -> None:
    event = audit_event("w-1", record(operation="listEpisodes", episodes=("a", "b")), "s")
    AuditEvent.model_validate(event)
    assert (event["action"], event["subtype"][0]["code"]) == ("E", "search-type")
    assert "meta" not in event
    assert len(event["entity"]) == 3


def exported(out: Path, *arguments: str) -> list[dict[str, Any]]:
    assert main(["audit", "export", "--out", str(out), *arguments]) == 0
    assert list(out.parent.glob("*.partial")) == []
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    events = [json.loads(line) for line in out.read_text().splitlines()]
    for event in events:
        AuditEvent.model_validate(event)
    assert len({event["id"] for event in events}) == len(events)
    return events


def names(events: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The stays of each event."""
    return [
        [e["what"]["identifier"]["value"] for e in event["entity"] if "role" in e]
        for event in events
    ]


async def write(log: EventLog) -> None:
    await log.open()
    await log.record([record(at(hour), episodes=(f"e{hour}",)) for hour in range(4)])
    await log.record([record(at(4), operation="listEpisodes", episodes=("e0", "e3"))])
    await log.close()


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
async def test_what_is_exported(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if kind == "sqlite":
        monkeypatch.setenv("LLM4EHR_LOG_PATH", str(tmp_path / "log.sqlite"))
        await write(SqliteLog(tmp_path / "log.sqlite"))
    else:
        url = request.getfixturevalue("postgres_url")
        monkeypatch.setenv("LLM4EHR_LOG_URL", url)
        await write(PostgresLog(url))
    out = tmp_path / "trail.ndjson"
    assert names(exported(out)) == [["e0"], ["e1"], ["e2"], ["e3"], ["e0", "e3"]]
    assert names(exported(out, "--since", stamp(1), "--until", stamp(3))) == [["e1"], ["e2"]]
    # Of a list only the stay that was asked about is told.
    assert names(exported(out, "--episode", "e3")) == [["e3"], ["e3"]]
    assert exported(out, "--episode", "e") == []


async def test_it_can_be_exported_while_the_service_runs(
    log_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLM4EHR_LOG_PATH", str(log_path))
    async with running(log_path) as client:
        await client.post("e", admitted_at=stamp(0), observations=[hr()])
        await client.risk()
        events = exported(tmp_path / "trail.ndjson")
    assert [event["action"] for event in events] == ["C", "R"]
    assert [event["meta"]["profile"] for event in events] == [[f"{BALP}Create"], [f"{BALP}Read"]]


def test_without_a_log_there_is_one_line_of_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLM4EHR_LOG_PATH", str(tmp_path / "none.sqlite"))
    assert main(["audit", "export", "--out", str(tmp_path / "trail.ndjson")]) == 1
    assert capsys.readouterr().err.startswith("error: cannot open the log")
    assert list(tmp_path.iterdir()) == []
