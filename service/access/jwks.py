"""The keys by which an issuer signs its tokens: read from it, kept, and read again in time."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from service.access.authenticator import IssuerUnavailable
from service.access.hosts import is_private_url

_logger = logging.getLogger(__name__)

REFRESH_S = 300.0
"""Keys that are older are read again, while they go on to be used."""

MAX_AGE_S = 24 * 3600.0
"""Keys that are older are not used any more: the issuer may have withdrawn them long ago."""

COOL_DOWN_S = 10.0
"""The issuer is asked no more often, whatever tokens come."""

_TIMEOUT_S = 5.0
_PATIENCE_S = 10.0
_MAX_BYTES = 256 * 1024
_MAX_KEYS = 100
_MIN_RSA_BITS = 2048

_Public = RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey


@dataclass(frozen=True, slots=True)
class Key:
    """A key for signatures, and the one algorithm it is for if it says so."""

    public: _Public
    algorithm: str | None


class IssuerKeys:
    """The keys of one issuer by their `kid`. For one event loop."""

    def __init__(
        self, issuer: str, url: str | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Reads `url`, or what the metadata of the issuer name."""
        self._issuer = issuer
        self._url = url
        self._clock = clock
        self._keys: dict[str, Key] = {}
        self._read_at: float | None = None
        self._asked_at: float | None = None
        self._asking: asyncio.Task[None] | None = None
        self.generation = 0
        """Counts the times that other keys were read than before."""

    async def get(self, kid: str) -> Key | None:
        """The key of that name, if the issuer has one. Raises IssuerUnavailable."""
        key = self._usable().get(kid)
        if key is None:
            await self._ask_again()
            if not self._usable():
                raise IssuerUnavailable
            return self._keys.get(kid)
        if self._age() > REFRESH_S:
            self._begin()  # who asks now does not wait for it
        return key

    def _age(self) -> float:
        return float("inf") if self._read_at is None else self._clock() - self._read_at

    def _usable(self) -> dict[str, Key]:
        return self._keys if self._age() <= MAX_AGE_S else {}

    async def _ask_again(self) -> None:
        self._begin()
        if self._asking is not None:
            # Nobody waits for ever, and who leaves does not end it for the others.
            await asyncio.wait([self._asking], timeout=_PATIENCE_S)

    def _begin(self) -> None:
        """Ask the issuer, unless it is being asked or was a moment ago."""
        now = self._clock()
        recently = self._asked_at is not None and now - self._asked_at < COOL_DOWN_S
        if self._asking is None and not recently:
            self._asked_at = now
            self._asking = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            keys = await asyncio.to_thread(fetch, self._issuer, self._url)
        except (OSError, HTTPException, ValueError, RecursionError) as error:
            _logger.error("the keys of the issuer of tokens are not read: %s", type(error).__name__)
        else:
            if keys != self._keys:
                self.generation += 1
            self._keys, self._read_at = keys, self._clock()
        finally:
            self._asking = None


def fetch(issuer: str, url: str | None) -> dict[str, Key]:
    """Read the keys now. Raises OSError, HTTPException, ValueError."""
    if url is None:
        metadata = _get(issuer.rstrip("/") + "/.well-known/openid-configuration")
        url = metadata.get("jwks_uri")
        if metadata.get("issuer") != issuer:
            raise ValueError("the metadata are of another issuer")
        if not isinstance(url, str) or not is_private_url(url):
            raise ValueError("the metadata name no https address of keys")
    found = _get(url).get("keys")
    if not isinstance(found, list) or len(found) > _MAX_KEYS:
        raise ValueError("there is no list of keys")
    keys: dict[str, Key] = {}
    for jwk in found:
        if (named := _key(jwk)) is not None:
            keys.setdefault(*named)
    if not keys:
        raise ValueError("there is no key for signatures")
    return keys


def _key(jwk: Any) -> tuple[str, Key] | None:
    """The key and its name; None if it is none that we use."""
    if not isinstance(jwk, dict) or jwk.get("use", "sig") != "sig":
        return None
    kid, algorithm = jwk.get("kid"), jwk.get("alg")
    if not isinstance(kid, str) or not isinstance(algorithm, str | None):
        return None
    if jwk.get("kty") not in ("RSA", "EC", "OKP"):
        return None
    try:
        public = jwt.PyJWK.from_dict(jwk).key
    except (jwt.PyJWTError, ValueError, TypeError, KeyError):
        return None
    if not isinstance(public, _Public):  # a private one would be known to others by now
        return None
    if isinstance(public, RSAPublicKey) and public.key_size < _MIN_RSA_BITS:
        return None
    return kid, Key(public, algorithm)


def _get(url: str) -> dict[str, Any]:
    """A JSON object from an address, without being sent to another one."""
    until = time.monotonic() + _TIMEOUT_S
    request = urllib.request.Request(url, headers={"Accept": "application/json"})
    try:
        with _opener().open(request, timeout=_TIMEOUT_S) as response:
            found = json.loads(_body(response, until))
    except urllib.error.HTTPError as error:
        error.close()
        raise
    if not isinstance(found, dict):
        raise ValueError("no JSON object")
    return found


def _body(response: HTTPResponse, until: float) -> bytes:
    body = bytearray()
    while chunk := response.read1(_MAX_BYTES):
        body += chunk
        if len(body) > _MAX_BYTES:
            raise ValueError("the answer is too long")
        if time.monotonic() > until:
            raise TimeoutError
    return bytes(body)


def _opener() -> urllib.request.OpenerDirector:
    """HTTP and HTTPS alone; redirects are errors. Plain HTTP stays on this machine: no proxy."""
    opener = urllib.request.OpenerDirector()
    proxies = {name: at for name, at in urllib.request.getproxies().items() if name == "https"}
    for handler in (
        urllib.request.ProxyHandler(proxies),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
    ):
        opener.add_handler(handler)
    return opener
