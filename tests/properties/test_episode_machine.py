"""The whole service in one process, driven at random, against a ledger of what it acknowledged."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from llm4ehr.bundle import Bundle, Network
from llm4ehr.episode import Statics
from service.access.authenticator import Anyone
from service.api import Dependencies, create_app
from service.log import SqliteLog
from service.settings import Settings
from service.times import format_time
from tests.online import Replica, engine_of, model_of, tiny_bundle
from tests.properties.ledger import Line, known
from tests.service.fakes import Clock, at, stamp

PATIENCE_S = 60
KINDS = ("hr", "temp", "creatinine", "creatinine_l")
EPISODES = ("a", "b", "c")
episodes = st.sampled_from(EPISODES)
shares = st.integers(0, 1000)
slots = st.integers(1, 2)


class EpisodeMachine(RuleBasedStateMachine):
    """Times are quarters of an hour, so that sums of them are exact. Values never repeat, so that
    no two items are alike by accident. The clock moves a minute with every request.
    """

    def __init__(self, bundle: Bundle, replica: Replica) -> None:
        super().__init__()
        self.bundle, self.replica = bundle, replica
        self.runner = asyncio.Runner()
        self.folder = tempfile.TemporaryDirectory()
        self.clock = Clock(at(4))
        self.lines: dict[str, list[Line]] = {}
        self.sent: dict[str, list[tuple[Line, dict[str, Any]]]] = {}
        self.promised: dict[str, list[str]] = {}  # ids named before their item came
        self.n = 0

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        self.clock.now += timedelta(minutes=1)
        return self.runner.run(asyncio.wait_for(coroutine, PATIENCE_S))

    # Life of the service.

    @initialize(n_slots=slots)
    def open(self, n_slots: int) -> None:
        self.run(self._open(n_slots))

    async def _open(self, n_slots: int) -> None:
        path = Path(self.folder.name) / "log.sqlite"
        self.engine = engine_of(self.bundle, n_slots=n_slots)
        app = create_app(
            # So few entries are kept in memory that stays are read again and again.
            Settings(log_path=path, staleness_limit_hours=None, cached_entries=8),
            Dependencies(
                authenticator=Anyone(),
                log=SqliteLog(path),
                model=model_of(self.bundle, self.engine),
                clock=self.clock,
            ),
        )
        self.engine.start()
        self.stack = AsyncExitStack()
        await self.stack.enter_async_context(app.router.lifespan_context(app))
        transport = httpx.ASGITransport(app=app)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://test")
        await self.stack.enter_async_context(self.http)

    async def _close(self) -> None:
        await self.stack.aclose()
        self.engine.close()

    @rule(n_slots=slots)
    def restart(self, n_slots: int) -> None:
        self.run(self._close())
        self.run(self._open(n_slots))

    @rule()
    def evict(self) -> None:
        """With at most two slots, three stays read in turn drive one another out."""
        for name in self.lines:
            self.read_latest(name, "risk")

    @rule(quarters=st.integers(1, 6))
    def wait(self, quarters: int) -> None:
        self.clock.now += timedelta(minutes=15 * quarters)

    def teardown(self) -> None:
        for name in self.lines:
            self.read(name)
        self.run(self._close())
        self.runner.close()
        self.folder.cleanup()

    # Writing.

    @rule(name=episodes, age=st.sampled_from([None, 40.0, 71.0]), quarters=st.integers(-2, 3))
    def admit(self, name: str, age: float | None, quarters: int) -> None:
        """Create a stay, or move its admission and replace what is known of the patient."""
        admitted, lines = quarters / 4, self.lines.setdefault(name, [])
        statics = {} if age is None else {"age_years": age, "sex": "female"}
        body = {"admitted_at": stamp(admitted), "statics": statics}
        response = self.run(self.http.put(f"/episodes/{name}", json=body))
        assert response.status_code == (200 if lines else 201)
        line = Line(
            seq=len(lines) + 1,
            recorded_at=self.clock.now,
            kind="admission",
            admitted=admitted,
            statics=Statics(**statics),
        )
        before = [(x.admitted, x.statics) for x in lines if x.kind == "admission"][-1:]
        if before != [(line.admitted, line.statics)]:
            lines.append(line)
        assert response.json()["seq"] == len(lines)

    def time(self, name: str, share: int) -> float:
        """A quarter between admission and now, in hours."""
        admitted = self.known(name).admitted
        now = (self.clock.now - at(0)) / timedelta(hours=1)
        return admitted + int((now - admitted) * 4 * share / 1000) / 4

    def item(self, kind: str, time: float, **more: Any) -> tuple[Line, dict[str, Any]]:
        """A new item and the line it will be."""
        self.n += 1
        event = {"code": "2160-0", "system": "http://loinc.org"}
        what, list_, low, factor, said = {
            "hr": ("hr", "observation", 60.0, 1, {"variable": "hr"}),
            "temp": ("temp", "observation", 36.0, 1, {"variable": "temp", "unit": "Cel"}),
            "creatinine": ("LOINC/2160-0", "event", 0.5, 1, event | {"unit": "mg/dL"}),
            # The log keeps what was sent, the model reads mg/dL.
            "creatinine_l": ("LOINC/2160-0", "event", 0.5, 10, event | {"unit": "mg/L"}),
        }[kind]
        value = low + self.n / 128
        line = Line(
            seq=0, recorded_at=self.clock.now, kind=list_, what=what, value=value, time=time,
            available=more.get("available"), target=more.get("corrects"),
            item_id=more.get("id", ""),
        )  # fmt: skip
        raw = said | {"value": value * factor, "time": stamp(time)}
        raw |= {key: more[key] for key in ("id", "corrects") if key in more}
        if line.available is not None:
            raw["available_at"] = stamp(line.available)
        return line, raw

    def post(self, name: str, *items: tuple[Line, dict[str, Any]]) -> None:
        """Send items that are good and new; all of them must be accepted in their order."""
        lists = [f"{line.kind}s" for line, _ in items]
        order = sorted(range(len(items)), key=lambda i: ["o", "e", "w"].index(lists[i][0]))
        body = {list_: [items[i][1] for i in order if lists[i] == list_] for list_ in set(lists)}
        response = self.run(self.http.post(f"/episodes/{name}/observations", json=body))
        results = response.json()["items"]
        assert [r["status"] for r in results] == ["accepted"] * len(items), results
        lines = self.lines[name]
        for i, result in zip(order, results, strict=True):
            line, raw = items[i]
            fields = {f: getattr(line, f) for f in Line.__dataclass_fields__}
            fields |= {"seq": len(lines) + 1, "recorded_at": self.clock.now}
            fields["item_id"] = line.item_id or result["item_id"]
            lines.append(Line(**fields))
            assert (result["seq"], result["item_id"]) == (len(lines), fields["item_id"])
            self.sent.setdefault(name, []).append((lines[-1], raw))
        assert response.json()["seq"] == len(lines)

    @precondition(lambda self: self.lines)
    @rule(
        which=shares,
        kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=4),
        times=st.lists(shares, min_size=4, max_size=4),
        anonymous=st.booleans(),
        delay=st.sampled_from([None, None, 0, 300, 1000]),
    )
    def append(
        self, which: int, kinds: list[str], times: list[int], anonymous: bool, delay: int | None
    ) -> None:
        """On time or late, known at once or later."""
        name = self.pick(which)
        items = []
        for kind, share in zip(kinds, times, strict=False):
            time, more = self.time(name, share), {}
            if not anonymous:
                more["id"] = f"i{self.n}"
            if delay is not None:
                more["available"] = max(time, self.time(name, delay))
            items.append(self.item(kind, time, **more))
        self.post(name, *items)

    @precondition(lambda self: self.lines)
    @rule(which=shares, whom=shares, share=shares, kind=st.sampled_from(KINDS))
    def correct(self, which: int, whom: int, share: int, kind: str) -> None:
        name = self.pick(which)
        corrected = self.target(name, whom)
        correction = self.item(kind, self.time(name, share), corrects=corrected, id=f"i{self.n}")
        self.post(name, correction)

    @precondition(lambda self: self.lines)
    @rule(which=shares, whom=shares)
    def withdraw(self, which: int, whom: int) -> None:
        name = self.pick(which)
        withdrawn = self.target(name, whom)
        self.n += 1
        raw = {"id": f"w{self.n}", "withdraws": withdrawn}
        line = Line(
            seq=0, recorded_at=self.clock.now, kind="withdrawal", target=withdrawn,
            item_id=f"w{self.n}",
        )  # fmt: skip
        self.post(name, (line, raw))

    def target(self, name: str, share: int) -> str:
        """The id of an item on record, or of one that will come."""
        ids = [line.item_id for line, _ in self.sent.get(name, []) if line.kind != "withdrawal"]
        if share < 250 or not ids:
            self.n += 1
            self.promised.setdefault(name, []).append(f"p{self.n}")
            return f"p{self.n}"
        return ids[share % len(ids)]

    @precondition(lambda self: any(self.promised.values()))
    @rule(which=shares, share=shares, delay=st.booleans())
    def arrive(self, which: int, share: int, delay: bool) -> None:
        """What was corrected or withdrawn before it came."""
        names = [name for name, ids in self.promised.items() if ids]
        name = names[which % len(names)]
        time = self.time(name, share)
        more = {"available": self.time(name, 1000)} if delay else {}
        self.post(name, self.item("hr", time, id=self.promised[name].pop(0), **more))

    @precondition(lambda self: any(self.sent.values()))
    @rule(which=shares, again=st.lists(shares, min_size=1, max_size=3))
    def duplicate(self, which: int, again: list[int]) -> None:
        names = [name for name, sent in self.sent.items() if sent]
        name = names[which % len(names)]
        items = [self.sent[name][i % len(self.sent[name])] for i in again]
        body: dict[str, list[Any]] = {"observations": [], "events": [], "withdrawals": []}
        for line, raw in items:
            body[f"{line.kind}s"].append(raw)
        response = self.run(self.http.post(f"/episodes/{name}/observations", json=body)).json()
        assert response["duplicates"] == len(items), response
        assert response["seq"] == len(self.lines[name])
        assert sorted(r["seq"] for r in response["items"]) == sorted(line.seq for line, _ in items)

    # Reading.

    def pick(self, which: int) -> str:
        return list(self.lines)[which % len(self.lines)]

    def known(self, name: str) -> Any:
        return known(self.lines[name], name)

    @precondition(lambda self: self.lines)
    @rule(which=shares)
    def read_everything(self, which: int) -> None:
        self.read(self.pick(which))

    @precondition(lambda self: self.lines)
    @rule(which=shares, seq=shares, by_time=st.booleans(), late=st.booleans())
    def read_as_of(self, which: int, seq: int, by_time: bool, late: bool) -> None:
        name = self.pick(which)
        line = self.lines[name][seq % len(self.lines[name])]
        instant = line.recorded_at + timedelta(seconds=30 if late else 0)
        self.read(name, instant if by_time else line.seq)

    @precondition(lambda self: self.lines)
    @rule(which=shares, resource=st.sampled_from(["risk", "embeddings"]))
    def read_the_latest_hour(self, which: int, resource: str) -> None:
        self.read_latest(self.pick(which), resource)

    def read_latest(self, name: str, resource: str) -> None:
        stay = self.known(name)
        hours = self.get(name, resource, len(self.lines[name]))["hours"]
        assert [hour["hour"] for hour in hours] == [stay.head_hour][: stay.head_hour + 1]

    def read(self, name: str, as_of: int | datetime | None = None) -> None:
        """Every hour there is, and the one that runs."""
        lines, now, params = self.lines[name], self.clock.now, {}
        if isinstance(as_of, int):
            lines = [line for line in lines if line.seq <= as_of]
            now, params = lines[-1].recorded_at, {"as_of": as_of}
        elif as_of is not None:
            lines = [line for line in lines if line.recorded_at <= as_of]
            now, params = as_of, {"as_of": format_time(as_of)}
        stay = known(lines, name)
        last = max(stay.head_hour, int((now - at(stay.admitted)) / timedelta(hours=1)))
        params |= {"from": 0, "to": last}
        risk = self.get(name, "risk", stay.seq, **params)["hours"]
        states = self.get(name, "embeddings", stay.seq, **params)["hours"]
        expected = stay.expected(self.replica, 0, last)
        for (body, embedding), hour, state in zip(expected, risk, states, strict=True):
            assert {field: hour[field] for field in body} == body
            assert state["embedding"] == embedding

    def get(self, name: str, resource: str, seq: int, **params: Any) -> dict[str, Any]:
        response = self.run(self.http.get(f"/episodes/{name}/{resource}", params=params))
        assert response.status_code == 200, response.text
        body: dict[str, Any] = response.json()
        assert (body["seq"], body["provenance"]["seq"]) == (seq, seq)
        assert body["provenance"]["as_of"] == params.get("as_of")
        return body


@pytest.fixture(scope="module")
def bundle(tiny_network: Callable[..., Network]) -> Bundle:
    return tiny_bundle(tiny_network)


@pytest.mark.timeout(900)  # a failure is made small before it is shown
def test_the_service_says_what_the_ledger_says(bundle: Bundle) -> None:
    replica = Replica(bundle)
    run_state_machine_as_test(
        lambda: EpisodeMachine(bundle, replica),
        settings=settings(max_examples=40, stateful_step_count=30),
    )
