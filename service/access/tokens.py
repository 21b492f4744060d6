"""Bearer tokens of an issuer of OAuth 2 or OpenID Connect: signed JWTs."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Mapping
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

    applications: tuple[str, ...]
    """`client_id` and `azp`, as far as it has them."""
    subject: str | None
    """`sub`: the application again, or a person who uses it."""
    scopes: frozenset[Scope]
    expires: float
    """Seconds since 1970."""

    @property
    def names(self) -> tuple[str, ...]:
        """All that its holder goes by."""
        return self.applications if self.subject is None else (*self.applications, self.subject)

    def who(self, own: Mapping[str, str]) -> str:
        """Its holder, for the audit trail: `application`, `person` or `application/person`.

        `own` has names of ours for some of its names.
        """
        application = sorted(self.applications, key=lambda name: name not in own)[:1]
        person = [] if self.subject in (None, *self.applications) else [self.subject]
        names = filter(None, application + person)
        return "/".join(own.get(name) or _without_slash(name) for name in names)


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
            *applications, subject = _names(claims)
            return Token(
                applications=tuple(filter(None, applications)),
                subject=subject,
                scopes=scopes_of(claims),
                expires=float(claims["exp"]),
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


def _without_slash(name: str) -> str:
    """So that nobody's own name reads as an application and a person."""
    return name.replace("%", "%25").replace("/", "%2F")


def _names(claims: dict[str, Any]) -> list[str | None]:
    """`client_id`, `azp` and `sub`. Raises ValueError."""
    names = [claims.get(name) or None for name in ("client_id", "azp", "sub")]
    given = [name for name in names if name is not None]
    if not given or not all(
        isinstance(n, str) and len(n) <= _MAX_NAME and n.isprintable() for n in given
    ):
        raise ValueError("it names nobody that can be written down")
    return names
