"""Which scopes of tokens allow what."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.access.principal import Scope, with_implied
from service.access.scopes import scopes_of

INGEST, DELETE, READ = {Scope.INGEST}, {Scope.DELETE}, {Scope.READ}
WRITE = INGEST | DELETE
NOTHING: set[Scope] = set()


@pytest.mark.parametrize(
    ("name", "granted"),
    [
        *((scope.value, with_implied({scope})) for scope in Scope),
        *((f"llm4ehr/{scope.value}", with_implied({scope})) for scope in Scope),
        ("ingest", WRITE),
        ("delete", DELETE),
        ("system/Observation.c", NOTHING),
        ("system/Observation.u", NOTHING),
        ("system/Observation.cu", INGEST),
        ("system/Observation.crus", INGEST),
        ("system/Observation.cruds", WRITE),
        ("system/Observation.write", WRITE),
        ("system/Observation.*", WRITE),
        ("system/RiskAssessment.r", READ),
        ("system/RiskAssessment.rs", READ),
        ("system/RiskAssessment.read", READ),
        ("system/*.read", READ),
        ("system/*.rs", READ),
        ("system/*.write", WRITE),
        ("system/*.cu", INGEST),
        ("system/*.cud", WRITE),
        ("system/*.cruds", WRITE | READ),
        ("system/*.*", WRITE | READ),
        ("system/Observation.rs", NOTHING),
        ("system/Observation.read", NOTHING),
        ("system/Observation.d", DELETE),
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
    ingest, read = "llm4ehr/ingest", "llm4ehr/read"
    assert scopes_of({claim: f"{ingest}  {read} x"}) == WRITE | READ
    assert scopes_of({claim: [ingest, read, 7, None, ["llm4ehr/admin"]]}) == WRITE | READ
    assert scopes_of({claim: [f"{ingest} {read}"]}) == NOTHING  # one name, and none that we know


@pytest.mark.parametrize("name", [*Scope, "system/*.*", "system/Observation.cruds"])
def test_what_somebody_is_elsewhere_grants_nothing(name: str) -> None:
    assert scopes_of({"roles": [name]}) == NOTHING
    assert scopes_of({"scope": name}) != NOTHING


def test_claims_add_up() -> None:
    claims = {"scope": "ingest", "scp": ["read"], "roles": ["llm4ehr/metrics", "admin"]}
    assert scopes_of(claims) == WRITE | READ | {Scope.METRICS}


@given(st.text(alphabet="system/*.cruds?Oveati", max_size=24))
def test_administration_takes_its_own_name(name: str) -> None:
    assert scopes_of({"scope": name}) <= WRITE | READ


@given(st.dictionaries(st.sampled_from(["scope", "scp", "roles"]), st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x, max_size=3)
)))  # fmt: skip
def test_nothing_breaks_it(claims: dict[str, Any]) -> None:
    scopes_of(claims)
