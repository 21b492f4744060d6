"""How much one client may ask: requests a second, requests at a time, wrong credentials."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv6Address

from service.access.hosts import parse_address
from service.access.principal import Principal
from service.api.problems import Problem

BURST_S = 5.0
"""So many seconds' worth of requests may come at once."""

FAILURES_PER_S = 1.0
FAILURES_AT_ONCE = 30.0
"""Wrong credentials from one address."""

_MAX_KNOWN = 10_000
_RETRY_AFTER_S = 1


@dataclass(slots=True)
class _Bucket:
    left: float
    at: float


class Buckets:
    """A bucket of tokens for each name, filled again at an even rate.

    Knows a bounded number of names. Beyond it the one that was used least recently is forgotten: it
    begins with a full bucket again.
    """

    def __init__(
        self, per_s: float, size: float, clock: Callable[[], float], most: int = _MAX_KNOWN
    ) -> None:
        self._per_s = per_s
        self._size = max(size, 1.0)
        self._clock = clock
        self._most = most
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def wait_s(self, name: str) -> float:
        """Seconds until a token is there; 0 if one is."""
        lacks = 1.0 - self._bucket(name).left
        return max(lacks / self._per_s, 0.0)

    def take(self, name: str) -> None:
        """Take a token, if there is one."""
        bucket = self._bucket(name)
        bucket.left = max(bucket.left - 1.0, 0.0)

    def _bucket(self, name: str) -> _Bucket:
        now = self._clock()
        bucket = self._buckets.get(name)
        if bucket is None:
            bucket = self._buckets[name] = _Bucket(self._size, now)
            if len(self._buckets) > self._most:
                self._buckets.popitem(last=False)
        else:
            self._buckets.move_to_end(name)
            bucket.left = min(bucket.left + (now - bucket.at) * self._per_s, self._size)
            bucket.at = now
        return bucket


class Limits:
    """The limits of all clients. For one event loop.

    Where everybody is taken for a client, an address stands for one.
    """

    def __init__(
        self,
        per_second: float | None,
        in_flight: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """None: no limit; without one of requests a second there is none of failures."""
        self._requests: Buckets | None = None
        self._failures: Buckets | None = None
        if per_second is not None:
            self._requests = Buckets(per_second, per_second * BURST_S, clock)
            self._failures = Buckets(FAILURES_PER_S, FAILURES_AT_ONCE, clock)
        self._right: OrderedDict[bytes, None] = OrderedDict()
        self._most = in_flight
        self._in_flight: dict[str, int] = {}

    def may_try(self, address: str, credentials: bytes) -> None:
        """Raises Problem where too many wrong credentials came from lately.

        Credentials that were right before are looked at all the same: a neighbour whose key has
        expired must not shut out whoever shares his address.
        """
        if self._failures is None or credentials in self._right:
            return
        if (wait := self._failures.wait_s(_network(address))) > 0:
            raise _refusal("too many credentials from this address were wrong", wait)

    def failed(self, address: str, credentials: bytes) -> None:
        """These credentials, a digest of them, were wrong."""
        self._right.pop(credentials, None)
        if self._failures is not None:
            self._failures.take(_network(address))

    def succeeded(self, credentials: bytes) -> None:
        """These credentials, a digest of them, were right."""
        self._right[credentials] = None
        self._right.move_to_end(credentials)
        if len(self._right) > _MAX_KNOWN:
            self._right.popitem(last=False)

    def count(self, principal: Principal, address: str) -> None:
        """One more request of a client. Raises Problem if it has too many a second."""
        if self._requests is None:
            return
        name = _name(principal, address)
        if (wait := self._requests.wait_s(name)) > 0:
            raise _refusal("too many requests a second of one client", wait)
        self._requests.take(name)

    @contextmanager
    def holding(self, principal: Principal, address: str) -> Iterator[None]:
        """A place among the requests of a client that are under way. Raises Problem."""
        if self._most is None:
            yield
            return
        name = _name(principal, address)
        n = self._in_flight.get(name, 0)
        if n >= self._most:
            detail = f"at most {self._most} requests of one client are answered at a time"
            raise _refusal(detail, _RETRY_AFTER_S)
        self._in_flight[name] = n + 1
        try:
            yield
        finally:
            if self._in_flight[name] == 1:
                del self._in_flight[name]
            else:
                self._in_flight[name] -= 1


def _refusal(detail: str, wait_s: float) -> Problem:
    headers = {"Retry-After": str(max(math.ceil(wait_s), 1))}
    return Problem("too-many-requests", detail, headers=headers)


def _name(principal: Principal, address: str) -> str:
    own = _network(address) if principal.method == "open" else principal.id
    return f"{principal.method}:{own}"


def _network(address: str) -> str:
    """An address, or the network that one customer has many IPv6 addresses of."""
    found = parse_address(address)
    if isinstance(found, IPv6Address):
        return found.exploded[:19]
    return address
