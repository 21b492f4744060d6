"""Clients that write at the same time to any replica, send again until they are answered, and look
at another replica whether what they were told is there.
"""

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

_LOOKS = 0.3
"""Share of the acknowledgements that are looked at right afterwards."""

# Lies above what a service under torture needs for anything, so that only what hangs is ended.
_TIMEOUT_S = 60

Item = dict[str, Any]
Kind = Literal["post", "again", "discharge", "delete", "read", "risk"]


@dataclass(frozen=True)
class Request:
    """One write or look. `items` in the order of its results."""

    kind: Kind
    episode: str
    body: dict[str, Any]

    @property
    def items(self) -> list[Item]:
        lists = ("observations", "events", "withdrawals")
        return [item for name in lists for item in self.body.get(name, [])]

    @property
    def n_counted(self) -> int:
        """How many of the items are measured or happened, and are counted as that."""
        return len(self.items) - len(self.body.get("withdrawals", []))


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
    attempts: dict[str, Request] = field(default_factory=dict)
    """Whatever was sent, as often as it was, by the id of the request."""
    answered: set[str] = field(default_factory=set)
    """Ids of requests that were answered as they should be."""
    changed: set[str] = field(default_factory=set)
    """Ids of those among them that were answered with something new."""
    least: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By episode: the last number, and how many items, that everybody must show."""
    discharged: set[str] = field(default_factory=set)
    deleted: set[str] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)
    """Requests, those that were sent again, duplicates, 503 answers to writes by their problem,
    looks at what was acknowledged, and those that no replica answered.
    """

    def most(self, episode: str) -> int:
        """How many items may be counted now."""
        return sum("withdraws" not in item for item in self.sent[episode])

    def show(self, episode: str, seq: int, n_more: int = 0) -> None:
        """From now on the episode reaches at least to `seq`, and has that many items more."""
        held, n = self.least.get(episode, (0, 0))
        self.least[episode] = (max(held, seq), n + n_more)


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
        self,
        number: int,
        seed: int,
        urls: Callable[[], Sequence[str]],
        ledger: Ledger,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """`urls` gives the replicas to choose from."""
        self._number = number
        self._n_attempts = 0
        self._random = Random(f"{seed} {number}")
        self._requests = requests(number, Random(f"{seed} {number} requests"), ledger)
        self._urls = urls
        self._ledger = ledger
        self._transport = transport

    async def work(self, go_on: Callable[[], bool]) -> None:
        async with httpx.AsyncClient(timeout=_TIMEOUT_S, transport=self._transport) as http:
            for request in self._requests:
                while (asked := await self._send(http, request)) is None:
                    self._ledger.counts["sent again"] += 1
                    await asyncio.sleep(self._random.uniform(0.005, 0.05))
                if self._random.random() < _LOOKS:
                    await self._look(http, request, asked)
                if not go_on():
                    return

    def _attempt(self, request: Request) -> str:
        """The id under which a request is sent once."""
        self._n_attempts += 1
        request_id = f"{self._number}-{self._n_attempts}"
        self._ledger.attempts[request_id] = request
        return request_id

    async def _send(self, http: httpx.AsyncClient, request: Request) -> str | None:
        """The replica that acknowledged it, or None."""
        self._ledger.counts["requests"] += 1
        replica = self._random.choice(self._urls())
        url = f"{replica}/episodes/{request.episode}"
        request_id = self._attempt(request)
        headers = {"X-Request-ID": request_id}
        try:
            match request.kind:
                case "discharge":
                    response = await http.patch(url, json=request.body, headers=headers)
                case "delete":
                    response = await http.delete(url, headers=headers)
                case _:
                    response = await http.post(
                        f"{url}/observations", json=request.body, headers=headers
                    )
        except httpx.TransportError:
            return None  # nobody knows whether it was recorded
        if response.status_code == 503:
            self._ledger.counts[response.json()["type"].removeprefix("/problems/")] += 1
            return None
        assert response.status_code in (200, 204), (request.kind, response.text)
        self._ledger.answered.add(request_id)
        if self._acknowledge(request, response):
            self._ledger.changed.add(request_id)
        return replica

    def _acknowledge(self, request: Request, response: httpx.Response) -> bool:
        """Note it; True if something was new."""
        ledger, episode = self._ledger, request.episode
        if request.kind == "delete":
            ledger.deleted.add(episode)
            return False
        body = response.json()
        if request.kind == "discharge":
            ledger.discharged.add(episode)
            ledger.show(episode, body["seq"])
            return False
        results = body["items"]
        statuses = Counter(result["status"] for result in results)
        ledger.counts["duplicates"] += statuses["duplicate"]
        allowed = {"duplicate"} | ({"accepted"} if request.kind == "post" else set())
        assert statuses.keys() <= allowed, results
        if request.kind == "post":
            ledger.acknowledged += [
                Acknowledged(episode, item, result["item_id"], result["seq"])
                for item, result in zip(request.items, results, strict=True)
            ]
        n_more = request.n_counted if request.kind == "post" else 0
        ledger.show(episode, max(result["seq"] for result in results), n_more)
        return statuses["accepted"] > 0

    async def _look(self, http: httpx.AsyncClient, written: Request, asked: str) -> None:
        """Right after a write, at another replica if there is one: whatever was acknowledged to
        anybody is there.
        """
        ledger, episode = self._ledger, written.episode
        replica = self._random.choice([url for url in self._urls() if url != asked] or [asked])
        seq, n_items = ledger.least[episode]
        request = Request(self._random.choice(["read", "risk"]), episode, {})
        request_id = self._attempt(request)
        try:
            response = await http.get(
                f"{replica}/episodes/{episode}{'/risk' if request.kind == 'risk' else ''}",
                params={"min_seq": seq} if self._random.random() < 0.5 else {},
                headers={"X-Request-ID": request_id},
            )
        except httpx.TransportError:
            ledger.counts["looks in vain"] += 1
            return
        if response.status_code == 503:
            ledger.counts["looks in vain"] += 1
            return
        ledger.counts["looks"] += 1
        if episode in ledger.deleted:
            assert response.status_code == 410, response.text
            return
        assert response.status_code == 200, response.text
        ledger.answered.add(request_id)
        body = response.json()
        assert body["seq"] >= seq, (body, seq)
        if request.kind == "read":
            assert n_items <= sum(body["counts"].values()) <= ledger.most(episode), body
