"""What an open-loop client will send: all requests of a while, made before the first is due."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from benchmarks.serving_items import correction_body, hour_body, stay_id

CORRECTED_HOURS_BACK = 3
MAX_HOURS = 200


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to send. `hours` are the next hour of the stay in each bed, and `stays` which stay of
    the bed that is; all were admitted at `admitted`. With `leave_at` a stay is discharged after so
    many hours, and another one is admitted. With `authority`, a file of certificates, the port
    speaks TLS.
    """

    port: int
    authority: str | None = None
    admitted: str
    hours: list[int]
    stays: list[int] = field(default_factory=list)
    leave_at: int | None = None
    rate: float
    seconds: float
    seed: int = 0
    corrections: float = 0.01  # shares of all requests; the rest are hours
    reads: float = 0.05
    followed: float = 0.2  # share of the posts whose risk is asked for at once
    connections: int = 64  # at most, and one for each request a second


@dataclass(slots=True)
class Request:
    """One request and when it was due."""

    kind: str  # post, correction, discharge, get, readable
    name: str
    due: float
    head: bytes
    body: bytes = b""
    follow: bool = False  # ask for the risk of what was posted
    conditional: bool = False  # ask again what was read last, with its entity tag


class Beds:
    """Makes the requests of a plan, and keeps the next hour of the stay in each bed."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._admitted = datetime.fromisoformat(plan.admitted)
        self.hours = list(plan.hours)
        self.stays = list(plan.stays) or [0] * len(plan.hours)
        self._turn: list[int] = []
        self._rng = random.Random(plan.seed)

    def schedule(self) -> list[Request]:
        """All requests, with due times from 0. Raises ValueError for a stay that gets too long."""
        plan, rng = self._plan, self._rng
        requests: list[Request] = []
        due = rng.expovariate(plan.rate)
        while due < plan.seconds:
            chance, bed = rng.random(), rng.randrange(len(self.hours))
            # The first hour of a stay may be under way still: nobody asks for it yet.
            known = self.hours[bed] > 1
            if known and chance < plan.reads:
                requests.append(self._read(bed, due))
            elif known and chance < plan.reads + plan.corrections:
                serial = plan.seed * 1_000_000 + len(requests)
                requests.append(self._correction(bed, due, serial))
            else:
                requests += self._hour(due)
            due += rng.expovariate(plan.rate)
        if max(self.hours) > MAX_HOURS:
            raise ValueError(f"a stay would get more than {MAX_HOURS} hours")
        return requests

    def _name(self, bed: int) -> str:
        return stay_id(bed, self.stays[bed])

    def _read(self, bed: int, due: float) -> Request:
        name = self._name(bed)
        conditional = self._rng.random() < 0.5
        return Request("get", name, due, head_of("GET", f"{name}/risk"), conditional=conditional)

    def _correction(self, bed: int, due: float, serial: int) -> Request:
        """Of an observation some hours back, or of the first hour."""
        hour = max(self.hours[bed] - 1 - CORRECTED_HOURS_BACK, 0)
        body = correction_body(bed, hour, serial, self._admitted)
        return self._write("correction", self._name(bed), due, body)

    def _hour(self, due: float) -> list[Request]:
        """The next hour of the next bed, after a discharge where it is time."""
        requests: list[Request] = []
        self._turn = self._turn or self._rng.sample(range(len(self.hours)), len(self.hours))
        bed = self._turn.pop()
        if self._plan.leave_at is not None and self.hours[bed] >= self._plan.leave_at:
            at = self._admitted + timedelta(hours=self.hours[bed])
            body = {"discharged_at": at.isoformat()}
            requests.append(self._write("discharge", self._name(bed), due, body))
            self.hours[bed] = 0
            self.stays[bed] += 1
        body = hour_body(bed, self.hours[bed], self._admitted)
        if self.hours[bed] == 0:
            body["admitted_at"] = self._admitted.isoformat()
        self.hours[bed] += 1
        return [*requests, self._write("post", self._name(bed), due, body)]

    def _write(self, kind: str, name: str, due: float, body: dict[str, Any]) -> Request:
        data = json.dumps(body).encode()
        if kind == "discharge":
            return Request(kind, name, due, head_of("PATCH", name, len(data)), data)
        head = head_of("POST", f"{name}/observations", len(data))
        follow = self._rng.random() < self._plan.followed
        return Request(kind, name, due, head, data, follow=follow)


def head_of(method: str, path: str, length: int | None = None) -> bytes:
    """Request line and headers, without the empty line that ends them."""
    lines = [f"{method} /episodes/{path} HTTP/1.1", "Host: 127.0.0.1"]
    if length is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {length}"]
    return "\r\n".join(lines).encode() + b"\r\n"
