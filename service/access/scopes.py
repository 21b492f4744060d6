"""What the scopes of a bearer token allow: our own names, and those of SMART on FHIR."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from service.access.principal import Scope, with_implied

# Where an issuer says what a token is for: names are ours there.
_SCOPES = ("scope", "scp")

# What its holder is, everywhere: "admin" may be one of anything, and our names say that they are.
_ROLES = "roles"

_FULL = {f"llm4ehr/{scope.value}": with_implied({scope}) for scope in Scope}
_OWN = {scope.value: with_implied({scope}) for scope in Scope} | _FULL

# `system/Observation.cu` of version 2, `.write` of version 1. A scope that is narrowed by a query
# (`?category=...`) is not matched: we could not keep to it.
_SMART = re.compile(r"system/(?P<resource>[A-Za-z]+|\*)\.(?P<may>c?r?u?d?s?|read|write|\*)")

_VERSION_1 = {"read": "rs", "write": "cud", "*": "cruds"}

_WRITTEN = frozenset({"Observation", "*"})
_READ = frozenset({"RiskAssessment", "*"})


def scopes_of(claims: Mapping[str, Any]) -> frozenset[Scope]:
    """The scopes that a token grants. What is unknown or of another form grants nothing."""
    granted = [_granted(name) for claim in _SCOPES for name in _names(claims.get(claim))]
    granted += [_FULL.get(name, frozenset()) for name in _names(claims.get(_ROLES))]
    return frozenset().union(*granted)


def _names(value: object) -> Iterable[str]:
    if isinstance(value, str):
        return value.split(" ")
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else ()


def _granted(name: str) -> frozenset[Scope]:
    if name in _OWN:
        return _OWN[name]
    if (smart := _SMART.fullmatch(name)) is None:
        return frozenset()
    may = _VERSION_1.get(smart["may"], smart["may"])
    written, read = smart["resource"] in _WRITTEN, smart["resource"] in _READ
    allowed = {
        # A stay is sent and corrected by the same routes.
        Scope.INGEST: written and "c" in may and "u" in may,
        Scope.DELETE: written and "d" in may,
        Scope.READ: read and "r" in may,
    }
    return frozenset(scope for scope, is_allowed in allowed.items() if is_allowed)
