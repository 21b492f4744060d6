"""What a gateway tells of a client: the subject of its certificate, and its address."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

from service.access.authenticator import Credentials, Unauthenticated
from service.access.hosts import parse_address

_MIN_SECRET = 16


class Gateways:
    """Believes those that come from a known network and know the secret."""

    def __init__(self, networks: Sequence[IPv4Network | IPv6Network], secret: str | None) -> None:
        """Without a secret no gateway is believed."""
        self._networks = tuple(networks)
        self._digest = None if secret is None else _digest(secret)

    def hears(self, credentials: Credentials) -> bool:
        """Whether a gateway that is believed sends this.

        A request that would pass for one of a gateway and is not must be refused, not served
        without what it claims: raises Unauthenticated.
        """
        if credentials.subject is None and credentials.gateway_secret is None:
            return False
        # The secret is compared whoever sent it, and takes as long if there is none.
        knows = hmac.compare_digest(
            _digest(credentials.gateway_secret or ""), self._digest or _digest("")
        )
        if not (self._is_known(credentials.peer) and knows and self._digest is not None):
            raise Unauthenticated("no gateway that is known sends this")
        return True

    def _is_known(self, peer: str) -> bool:
        address = parse_address(peer)
        return address is not None and any(address in network for network in self._networks)


def forwarded(credentials: Credentials) -> str:
    """The client's address as a gateway tells it: what it added last; else the gateway's own."""
    last = (credentials.forwarded_for or "").rpartition(",")[2].strip()
    address = parse_address(last)
    return credentials.peer if address is None else str(address)


def read_secret(path: Path) -> str:
    """The secret that a file holds. Raises OSError, ValueError."""
    secret = path.read_text(encoding="ascii").strip()
    if len(secret) < _MIN_SECRET or not secret.isprintable():
        raise ValueError(f"{path}: a secret of a gateway has at least {_MIN_SECRET} characters")
    return secret


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
