"""Clients that write at the same time to any replica, and send again until they are answered."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from random import Random
from typing import Any, Literal

import httpx

from service.times import format_time

HOURS = 8
"""Items lie in the first hours of stays that were admitted long before."""

_SHARED_REQUESTS, _OWN_REQUESTS = 120, 12
"""So many requests are about one stay before the next one begins, so that none becomes large."""

# Lies above what a service under torture needs for anything, so that only what hangs is ended.
_TIMEOUT_S = 60

Item = dict[str, Any]
Kind = Literal["post", "again", "discharge", "delete"]


@dataclass(frozen=True)
class Request:
    """One write. `items` in the order of its results."""

    kind: Kind
    episode: str
    body: dict[str, Any]

    @property
    def items(self) -> list[Item]:
        lists = ("observations", "events", "withdrawals")
        return [item for name in lists for item in self.body.get(name, [])]


@dataclass(frozen=True)
class Acknowledged:
    """An item that a replica has answered for."""

    episode: str
    item: Item
    item_id: str
    seq: int


@dataclass
class Ledger:
    """What was sent and what was acknowledged, of all clients together."""

    admitted_at: datetime
    sent: dict[str, list[Item]] = field(default_factory=dict)
    """Every item by episode, once."""
    acknowledged: list[Acknowledged] = field(default_factory=list)
    discharged: set[str] = field(default_factory=set)
    deleted: set[str] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)
    """Requests, those that were sent again, duplicates, and 503 answers by their problem."""


def requests(client: int, random: Random, ledger: Ledger) -> Iterator[Request]:
    """What a client has to say, without end; the next one once the last was acknowledged."""
    said: dict[str, list[str]] = {}
    done: list[Request] = []
    serial = 0

    def instant() -> str:
        return format_time(ledger.admitted_at + timedelta(hours=random.uniform(0, HOURS)))

    def observation(episode: str) -> Item:
        nonlocal serial
        serial += 1
        item = {"variable": "hr", "value": 40 + serial % 1500 / 10, "time": instant()}
        if random.random() < 0.8:
            names = said.setdefault(episode, [])
            item["id"] = f"{client}-{serial}"
            if names and random.random() < 0.3:
                item["corrects"] = random.choice(names)
            names.append(item["id"])
        return item

    def post(episode: str) -> Request:
        body: dict[str, Any] = {
            "admitted_at": format_time(ledger.admitted_at),
            "observations": [observation(episode) for _ in range(random.randint(1, 3))],
        }
        if random.random() < 0.2:
            event = {"code": "2160-0", "system": "http://loinc.org", "unit": "mg/dL"}
            body["events"] = [event | {"value": 1 + serial % 1500 / 1000, "time": instant()}]
        names = said.get(episode, [])
        if len(names) > 3 and random.random() < 0.2:
            withdrawn = names.pop(random.randrange(len(names)))
            body["withdrawals"] = [{"id": f"w-{withdrawn}", "withdraws": withdrawn}]
        request = Request("post", episode, body)
        ledger.sent.setdefault(episode, []).extend(request.items)
        done.append(request)
        return request

    n = 0
    for stay in range(1_000_000):
        own = f"own-{client}-{stay}"
        for _ in range(_OWN_REQUESTS):
            n += 1
            yield post(own)
            yield post(f"shared-{random.randrange(2)}-{n // _SHARED_REQUESTS}")
            if random.random() < 0.2:
                former = random.choice(done[-20:])
                if former.episode not in ledger.deleted:
                    yield Request("again", former.episode, former.body)
        discharged_at = format_time(ledger.admitted_at + timedelta(hours=HOURS))
        yield Request("discharge", own, {"discharged_at": discharged_at})
        if random.random() < 0.3:
            yield Request("delete", own, {})


class Client:
    """Works through its requests until it is told to stop; the last one is finished."""

    def __init__(
        self, number: int, seed: int, urls: Callable[[], Sequence[str]], ledger: Ledger
    ) -> None:
        """`urls` gives the replicas to choose from."""
        self._random = Random(f"{seed} {number}")
        self._requests = requests(number, Random(f"{seed} {number} requests"), ledger)
        self._urls = urls
        self._ledger = ledger

    async def work(self, go_on: Callable[[], bool]) -> None:
        async with httpx.AsyncClient(timeout=_TIMEOUT_S) as http:
            for request in self._requests:
                while not await self._send(http, request):
                    self._ledger.counts["sent again"] += 1
                    await asyncio.sleep(self._random.uniform(0.005, 0.05))
                if not go_on():
                    return

    async def _send(self, http: httpx.AsyncClient, request: Request) -> bool:
        """True once it is acknowledged."""
        self._ledger.counts["requests"] += 1
        url = f"{self._random.choice(self._urls())}/episodes/{request.episode}"
        try:
            match request.kind:
                case "post" | "again":
                    response = await http.post(f"{url}/observations", json=request.body)
                case "discharge":
                    response = await http.patch(url, json=request.body)
                case "delete":
                    response = await http.delete(url)
        except httpx.TransportError:
            return False  # nobody knows whether it was recorded
        if response.status_code == 503:
            self._ledger.counts[response.json()["type"].removeprefix("/problems/")] += 1
            return False
        assert response.status_code in (200, 204), (request.kind, response.text)
        self._acknowledge(request, response)
        return True

    def _acknowledge(self, request: Request, response: httpx.Response) -> None:
        ledger = self._ledger
        match request.kind:
            case "discharge":
                ledger.discharged.add(request.episode)
            case "delete":
                ledger.deleted.add(request.episode)
            case _:
                results = response.json()["items"]
                statuses = Counter(result["status"] for result in results)
                ledger.counts["duplicates"] += statuses["duplicate"]
                allowed = {"duplicate"} | ({"accepted"} if request.kind == "post" else set())
                assert statuses.keys() <= allowed, results
                if request.kind == "post":
                    ledger.acknowledged += [
                        Acknowledged(request.episode, item, result["item_id"], result["seq"])
                        for item, result in zip(request.items, results, strict=True)
                    ]
