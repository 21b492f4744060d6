"""How a client proves who it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from service.access.principal import Principal, Scope


class Unauthenticated(Exception):
    """Nobody was recognised. The message says why, and repeats nothing that was sent."""


class IssuerUnavailable(Exception):
    """Whether a token is valid cannot be said: its issuer's keys are not to be had."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Credentials:
    """What a request says of its sender. Never printed: it holds secrets."""

    authorization: str | None
    """The header of that name."""
    subject: str | None
    """Of the client's certificate, as a gateway tells it."""
    gateway_secret: str | None
    peer: str
    """Address of the other end of the connection; empty if it is none."""
    forwarded_for: str | None
    """Address of the client, as a gateway tells it."""


class Authenticator(Protocol):
    """Recognises clients."""

    def address(self, credentials: Credentials) -> str:
        """Where a request comes from, as far as what it says of that is believed."""
        ...

    async def recognise(self, credentials: Credentials) -> Principal:
        """Who sends this. Raises Unauthenticated, IssuerUnavailable."""
        ...


class Anyone:
    """Takes everybody for a client that may do everything: for demonstrations alone."""

    _principal = Principal(id="anyone", method="open", scopes=frozenset(Scope))

    def address(self, credentials: Credentials) -> str:
        return credentials.peer

    async def recognise(self, credentials: Credentials) -> Principal:
        return self._principal
