"""Bearer tokens of an issuer of OAuth 2 or OpenID Connect: signed JWTs."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import jwt

from service.access.authenticator import Unauthenticated
from service.access.jwks import IssuerKeys
from service.access.principal import Scope
from service.access.scopes import scopes_of

MAX_BYTES = 8192
"""Of a token."""

_TYPES = frozenset({"jwt", "at+jwt", "application/at+jwt"})
_REQUIRED = ["iss", "aud", "exp", "iat"]
_MAX_KEPT = 4096
_KEPT_S = 300.0
_MAX_NAME = 200

_INVALID = "the token is not valid"


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """What a valid token says."""

    names: tuple[str, ...]
    """What its holder goes by: `client_id`, `azp`, `sub`, as far as it has them."""
    scopes: frozenset[Scope]
    expires: float
    """Seconds since 1970."""


@dataclass(frozen=True, slots=True)
class _Kept:
    token: Token
    generation: int
    until: float


class Tokens:
    """Verifies tokens. What was found valid is kept for minutes: signatures take time.

    A token that is kept is verified again when the keys of the issuer change.
    """

    def __init__(
        self, keys: IssuerKeys, *, issuer: str, audience: str, algorithms: tuple[str, ...],
        leeway_s: float,
    ) -> None:  # fmt: skip
        self._keys = keys
        self._issuer = issuer
        self._audience = audience
        self._algorithms = algorithms
        self._leeway_s = leeway_s
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()

    async def verify(self, text: str) -> Token:
        """What a token says. Raises Unauthenticated, IssuerUnavailable."""
        if len(text) > MAX_BYTES:
            raise Unauthenticated("the token is too long")
        if not text.isascii():
            raise Unauthenticated(_INVALID)
        name = hashlib.sha256(text.encode()).digest()
        kept = self._kept.get(name)
        if kept is not None and kept.generation == self._keys.generation:
            if min(kept.until, kept.token.expires + self._leeway_s) > time.time():
                self._kept.move_to_end(name)
                return kept.token
            del self._kept[name]
        token = await self._read(text)
        self._kept[name] = _Kept(token, self._keys.generation, time.time() + _KEPT_S)
        if len(self._kept) > _MAX_KEPT:
            self._kept.popitem(last=False)
        return token

    async def _read(self, text: str) -> Token:
        algorithm, kid = self._head(text)
        key = await self._keys.get(kid)
        if key is None or key.algorithm not in (None, algorithm):
            raise Unauthenticated(_INVALID)
        try:
            claims = jwt.decode(
                text,
                key.public,
                # That of the token alone: it is one of the allowed ones, and suits the key.
                algorithms=[algorithm],
                issuer=self._issuer,
                audience=self._audience,
                leeway=self._leeway_s,
                options={"require": _REQUIRED},
            )
            return Token(
                names=_names(claims), scopes=scopes_of(claims), expires=float(claims["exp"])
            )
        except jwt.ExpiredSignatureError:
            raise Unauthenticated("the token has expired") from None
        except jwt.ImmatureSignatureError:
            raise Unauthenticated("the token is not valid yet") from None
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError):
            raise Unauthenticated(_INVALID) from None

    def _head(self, text: str) -> tuple[str, str]:
        """Algorithm and name of the key, which nothing vouches for yet. Raises Unauthenticated."""
        try:
            head = jwt.get_unverified_header(text)
        except (jwt.PyJWTError, ValueError, TypeError, RecursionError):
            raise Unauthenticated(_INVALID) from None
        algorithm, kid, kind = head.get("alg"), head.get("kid"), head.get("typ", "JWT")
        if (
            algorithm not in self._algorithms
            or not isinstance(kid, str)
            or not isinstance(kind, str)
            or kind.lower() not in _TYPES
            or "crit" in head  # there is no extension that we understand
        ):
            raise Unauthenticated(_INVALID)
        return algorithm, kid


def _names(claims: dict[str, Any]) -> tuple[str, ...]:
    names = [claims[name] for name in ("client_id", "azp", "sub") if claims.get(name)]
    if not names or not all(
        isinstance(n, str) and len(n) <= _MAX_NAME and n.isprintable() for n in names
    ):
        raise ValueError("it names nobody that can be written down")
    return tuple(names)
