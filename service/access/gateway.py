"""What a gateway tells of a client: the subject of its certificate, and its address."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

from service.access.authenticator import Credentials, Unauthenticated
from service.access.hosts import parse_address

_MIN_SECRET = 16
_MAX_SECRETS = 2


class Gateways:
    """Believes those that come from a known network and know the secret."""

    def __init__(
        self, networks: Sequence[IPv4Network | IPv6Network], secrets: Sequence[str]
    ) -> None:
        """Without a secret no gateway is believed."""
        self._networks = tuple(networks)
        # Where there is none, what is sent is compared all the same, with what nobody knows.
        self._digests = tuple(map(_digest, secrets)) or (os.urandom(32),)

    def hears(self, credentials: Credentials) -> bool:
        """Whether a gateway that is believed sends this.

        A request that would pass for one of a gateway and is not must be refused, not served
        without what it claims: raises Unauthenticated.
        """
        if credentials.subject is None and credentials.gateway_secret is None:
            return False
        # Compared whoever sent it, with all of them: it takes as long for a wrong one.
        ours = _digest(credentials.gateway_secret or "")
        equal = [hmac.compare_digest(ours, one) for one in self._digests]
        if not (self._is_known(credentials.peer) and any(equal)):
            raise Unauthenticated("no gateway that is known sends this")
        return True

    def _is_known(self, peer: str) -> bool:
        address = parse_address(peer)
        return address is not None and any(address in network for network in self._networks)


def forwarded(credentials: Credentials) -> str:
    """The client's address as a gateway tells it: what it added last; else the gateway's own."""
    last = (credentials.forwarded_for or "").rpartition(",")[2].strip()
    address = None if "%" in last else parse_address(last)  # a zone may be any text
    return credentials.peer if address is None else str(address)


def read_secrets(path: Path) -> list[str]:
    """The secrets that a file holds, one a line: two while one takes the place of the other.

    Raises OSError, ValueError.
    """
    secrets = [line.strip() for line in path.read_text(encoding="ascii").splitlines() if line]
    if not 1 <= len(secrets) <= _MAX_SECRETS or min(map(len, secrets)) < _MIN_SECRET:
        raise ValueError(
            f"{path}: it must hold one or two lines, each a secret of {_MIN_SECRET} or more "
            "characters"
        )
    return secrets


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
