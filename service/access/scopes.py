"""What the scopes of a bearer token allow: our own names, and those of SMART on FHIR."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from service.access.principal import Scope

_CLAIMS = ("scope", "scp", "roles")

_OWN = {name: scope for scope in Scope for name in (scope.value, f"llm4ehr/{scope.value}")}

# `system/Observation.cu` of version 2, `.write` of version 1. A scope that is narrowed by a query
# (`?category=...`) is not matched: we could not keep to it.
_SMART = re.compile(r"system/(?P<resource>[A-Za-z]+|\*)\.(?P<may>c?r?u?d?s?|read|write|\*)")

_VERSION_1 = {"read": "rs", "write": "cud", "*": "cruds"}

_WRITTEN = frozenset({"Observation", "*"})
_READ = frozenset({"RiskAssessment", "*"})


def scopes_of(claims: Mapping[str, Any]) -> frozenset[Scope]:
    """The scopes that a token grants. What is unknown or of another form grants nothing."""
    return frozenset(scope for name in _names(claims) for scope in _granted(name))


def _names(claims: Mapping[str, Any]) -> Iterable[str]:
    for claim in _CLAIMS:
        value = claims.get(claim)
        if isinstance(value, str):
            yield from value.split(" ")
        elif isinstance(value, list):
            yield from (name for name in value if isinstance(name, str))


def _granted(name: str) -> Iterable[Scope]:
    if name in _OWN:
        yield _OWN[name]
    elif (smart := _SMART.fullmatch(name)) is not None:
        may = _VERSION_1.get(smart["may"], smart["may"])
        if smart["resource"] in _WRITTEN and ("c" in may or "u" in may):
            yield Scope.INGEST
        if smart["resource"] in _READ and "r" in may:
            yield Scope.READ
