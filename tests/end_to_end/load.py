"""Clients that post at the same time, lose their connection, and send again until acknowledged."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import httpx

from service.times import format_time
from tests.end_to_end.server import PATIENCE_S

HOURS = 10
"""Items lie in the first hours of stays that were admitted long before."""


@dataclass(frozen=True)
class Request:
    """One POST; `items` in the order of its results."""

    episode: str
    body: dict[str, Any]

    @property
    def items(self) -> list[dict[str, Any]]:
        return [
            item
            for list_ in ("observations", "events", "withdrawals")
            for item in self.body.get(list_, [])
        ]

    def send(self, http: httpx.Client) -> list[Acknowledged]:
        """Raises httpx.TransportError."""
        response = http.post(f"/episodes/{self.episode}/observations", json=self.body)
        assert response.status_code == 200, response.text
        results = response.json()["items"]
        assert {result["status"] for result in results} <= {"accepted", "duplicate"}, results
        return [
            Acknowledged(self.episode, item, result["item_id"], result["seq"], result["status"])
            for item, result in zip(self.items, results, strict=True)
        ]


@dataclass(frozen=True)
class Acknowledged:
    """An item that the service has answered for."""

    episode: str
    item: dict[str, Any]
    item_id: str
    seq: int
    status: str


def requests(client: int, n: int, admitted_at: datetime) -> Iterator[Request]:
    """A client's work: new items with and without ids, corrections, withdrawals. No two alike."""
    rng = random.Random(client)
    said: dict[str, list[str]] = {}
    serial = 0
    for k in range(n):
        episode = rng.choice(["shared-0", "shared-1", f"own-{client}"])
        body: dict[str, Any] = {"admitted_at": format_time(admitted_at), "observations": []}
        names = said.setdefault(episode, [])
        for _ in range(rng.randint(1, 4)):
            serial += 1
            instant = admitted_at + timedelta(hours=rng.uniform(0, HOURS))
            item = {"variable": "hr", "value": 50 + client + serial / 100} | {
                "time": format_time(instant)
            }
            if rng.random() < 0.8:
                item["id"] = f"{client}-{serial}"
                if names and rng.random() < 0.3:
                    item["corrects"] = rng.choice(names)
                names.append(item["id"])
            body["observations"].append(item)
        if k % 3 == 0:
            instant = admitted_at + timedelta(hours=rng.uniform(0, HOURS))
            body["events"] = [
                {"code": "2160-0", "system": "http://loinc.org", "unit": "mg/dL"}
                | {"value": 1 + client + serial / 1000, "time": format_time(instant)}
            ]
        if k % 5 == 4 and names:
            withdrawn = names.pop(rng.randrange(len(names)))
            body["withdrawals"] = [{"id": f"w{client}-{k}", "withdraws": withdrawn}]
        yield Request(episode, body)


class Load:
    """Several clients at work; each sends a request again until it is answered."""

    def __init__(self, port: int, work: list[list[Request]]) -> None:
        self.acknowledged: list[Acknowledged] = []
        self.n_requests = sum(map(len, work))
        self.n_done = 0
        self._url = f"http://127.0.0.1:{port}"
        self._errors: list[BaseException] = []
        self._up = self._abandoned = False
        self._under_way = 0
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._client, args=(own,)) for own in work]
        for thread in self._threads:
            thread.start()

    def resume(self) -> None:
        with self._changed:
            self._up = True
            self._changed.notify_all()

    def pause(self) -> None:
        """Returns when no request is under way."""
        with self._changed:
            self._up = False
            assert self._changed.wait_for(lambda: self._under_way == 0, timeout=PATIENCE_S)

    def wait_for(self, n: int) -> None:
        """Until so many requests are done."""
        with self._changed:
            reached = self._changed.wait_for(
                lambda: self._errors or self.n_done >= n, timeout=PATIENCE_S
            )
        assert not self._errors, self._errors
        assert reached

    def finish(self) -> None:
        self.wait_for(self.n_requests)

    def abandon(self) -> None:
        """End all clients, whatever is left to do."""
        with self._changed:
            self._up = self._abandoned = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(PATIENCE_S)

    def _client(self, requests: list[Request]) -> None:
        try:
            with httpx.Client(base_url=self._url, timeout=PATIENCE_S) as http:
                for request in requests:
                    while not self._abandoned and not self._send(http, request):
                        pass
        except BaseException as error:
            with self._changed:
                self._errors.append(error)
                self._changed.notify_all()

    def _send(self, http: httpx.Client, request: Request) -> bool:
        """True once the request is acknowledged."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._up, timeout=PATIENCE_S)
            self._under_way += 1
        acknowledged: list[Acknowledged] = []
        try:
            acknowledged = request.send(http)
        except httpx.TransportError:
            pass  # nobody knows whether it was recorded
        finally:
            with self._changed:
                self._under_way -= 1
                self.acknowledged += acknowledged
                self.n_done += bool(acknowledged)
                self._changed.notify_all()
        return bool(acknowledged)
