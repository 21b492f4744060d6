"""Which scopes of tokens allow what."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.access.principal import Scope
from service.access.scopes import scopes_of

INGEST, READ = {Scope.INGEST}, {Scope.READ}
NOTHING: set[Scope] = set()


@pytest.mark.parametrize(
    ("name", "granted"),
    [
        *((scope.value, {scope}) for scope in Scope),
        *((f"llm4ehr/{scope.value}", {scope}) for scope in Scope),
        ("system/Observation.c", INGEST),
        ("system/Observation.u", INGEST),
        ("system/Observation.cu", INGEST),
        ("system/Observation.cruds", INGEST),
        ("system/Observation.write", INGEST),
        ("system/Observation.*", INGEST),
        ("system/RiskAssessment.r", READ),
        ("system/RiskAssessment.rs", READ),
        ("system/RiskAssessment.read", READ),
        ("system/*.read", READ),
        ("system/*.rs", READ),
        ("system/*.write", INGEST),
        ("system/*.cud", INGEST),
        ("system/*.cruds", INGEST | READ),
        ("system/*.*", INGEST | READ),
        ("system/Observation.rs", NOTHING),
        ("system/Observation.read", NOTHING),
        ("system/Observation.d", NOTHING),
        ("system/RiskAssessment.s", NOTHING),
        ("system/RiskAssessment.write", NOTHING),
        ("system/RiskAssessment.sr", NOTHING),
        ("system/RiskAssessment.rr", NOTHING),
        ("system/RiskAssessment.", NOTHING),
        ("system/RiskAssessment.rs?patient=1", NOTHING),
        ("system/Patient.cruds", NOTHING),
        ("patient/*.cruds", NOTHING),
        ("user/*.*", NOTHING),
        ("system/*", NOTHING),
        ("xsystem/*.*", NOTHING),
        ("READ", NOTHING),
        ("read\n", NOTHING),
        ("system/*.read\n", NOTHING),
        ("llm4ehr/", NOTHING),
        ("openid", NOTHING),
        ("", NOTHING),
    ],
)
def test_every_name(name: str, granted: set[Scope]) -> None:
    assert scopes_of({"scope": name}) == granted


@pytest.mark.parametrize("claim", ["scope", "scp", "roles"])
def test_claims_are_texts_or_lists(claim: str) -> None:
    assert scopes_of({claim: "ingest  read x"}) == INGEST | READ
    assert scopes_of({claim: ["ingest", "read", 7, None, ["admin"]]}) == INGEST | READ
    assert scopes_of({claim: ["ingest read"]}) == NOTHING  # one name, and none that we know


def test_claims_add_up() -> None:
    assert scopes_of({"scope": "ingest", "scp": ["read"], "roles": "x"}) == INGEST | READ


@given(st.text(alphabet="system/*.cruds?Oveati", max_size=24))
def test_administration_takes_its_own_name(name: str) -> None:
    assert scopes_of({"scope": name}) <= INGEST | READ


@given(st.dictionaries(st.sampled_from(["scope", "scp", "roles"]), st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x, max_size=3)
)))  # fmt: skip
def test_nothing_breaks_it(claims: dict[str, Any]) -> None:
    scopes_of(claims)
