"""Parsers of short texts: they give what they promise, or the error they document."""

from __future__ import annotations

import base64
import json
import math
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from starlette.requests import Request

from llm4ehr.variables import VARIABLES, CodeError, UnitError, convert, resolve_code, resolve_name
from service.access.principal import Principal, Scope
from service.api.hours import _matches
from service.api.listing import page
from service.api.problems import Problem
from service.api.schemas import AsOf, ListQuery
from service.api.waiting import preferred_wait
from service.entries import from_us, to_us
from service.settings import Settings
from service.times import TimeError, format_time, parse_time
from service.units import canonical_code, convert_event
from tests.fuzz.hostile import damaged, long_texts, marked
from tests.fuzz.house import MARK, attempt, examples, tried
from tests.service.fakes import at

ANYONE = Principal(id="anyone", method="open", scopes=frozenset(Scope))
ANY = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), marked, long_texts)
_STAMP = b"2026-03-01T08:00:00.123456+01:30"
_times = st.one_of(
    ANY,
    damaged(_STAMP).map(lambda data: data.decode("utf-8", "replace")),
    st.from_regex(r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9:.]{5,20}([Zz]|[+-][0-9]{2}:[0-9]{2})?"),
    st.datetimes(timezones=st.timezones()).map(datetime.isoformat),
)


@examples(300)
@given(_times)
def test_times(text: Any) -> None:
    tried("times")
    instant = attempt(TimeError, lambda: parse_time(text))
    if isinstance(instant, TimeError):
        assert instant.reason in {"time-invalid", "time-naive"}
        assert MARK not in str(instant)
        return
    assert instant.tzinfo is UTC
    assert from_us(to_us(instant)) == instant
    assert parse_time(format_time(instant)) == instant


_unit_parts = st.sampled_from(
    [
        *["mg", "dL", "mmol", "L", "/", "10*", "10*99", "{", "}", "[IU]", "%", " ", "µ", "K"],
        *["mm[Hg]", "m", "IU", "eq", "1", "", "\x00", "x10^", "//", "kPa", "[lb_av]", "min"],
    ]
)
_units = st.none() | marked | st.lists(_unit_parts, max_size=60).map("".join)
_values = st.floats() | st.sampled_from([0.0, -0.0, 1e308, -1e308, 5e-324])
_CODES = ["LOINC/2160-0", "LOINC/2524-7", "LOCAL/x", "LOINC/19123-9", ""]


@examples(400)
@given(st.sampled_from(_CODES), _values, _units, st.sampled_from(["mg/dL", "mmol/L", "h", "?"]))
def test_units_of_events(code: str, value: float, unit: str | None, to: str) -> None:
    tried("units")
    assume(math.isfinite(value))
    converted = attempt(UnitError, lambda: convert_event(code, value, unit, to))
    if isinstance(converted, UnitError):
        assert converted.reason.startswith(("unit-", "value-"))
        assert MARK not in str(converted)
    else:
        assert math.isfinite(converted)


@examples(300)
@given(st.sampled_from(VARIABLES), _values, _units)
def test_units_of_variables(variable: Any, value: float, unit: str | None) -> None:
    tried("units")
    assume(math.isfinite(value))
    converted = attempt(UnitError, lambda: convert(variable, value, unit))
    if isinstance(converted, UnitError):
        assert converted.reason.startswith("unit-")
        assert MARK not in str(converted)


_codes = st.one_of(
    marked,
    st.from_regex(r"[0-9]{1,12}(-[0-9])?", fullmatch=True),
    st.sampled_from(["8867-4", "LOINC/8867-4", "/", "", "٣-٣", "147842", "0" * 128]),
)
_systems = st.none() | marked | st.sampled_from(["http://loinc.org", "mdc", "LN", "", ":", "urn:"])


@examples(300)
@given(_codes, _systems)
def test_codes(code: str, system: str | None) -> None:
    tried("codes")
    assert "/" in canonical_code(code, system)
    found = attempt(CodeError, lambda: resolve_code(code, system))
    if isinstance(found, CodeError):
        assert found.reason in {"code-unknown", "code-refused"}
        assert MARK not in str(found)
    with pytest.raises(CodeError):
        resolve_name(MARK + code)


_places = st.lists(
    st.sampled_from(["risk", "episode_id", "updated_at"]) | st.booleans() | ANY, max_size=6
)
_cursors = st.one_of(
    marked,
    st.binary(max_size=300).map(lambda data: base64.urlsafe_b64encode(data).decode()),
    _places.map(lambda place: base64.urlsafe_b64encode(json.dumps(place).encode()).decode()),
    st.integers(1, 380).map(lambda n: base64.urlsafe_b64encode(b"[" * n).decode()),
)


@examples(300)
@given(_cursors, st.sampled_from(["risk", "episode_id", "admitted_at"]))
def test_cursors(cursor: str, sort: Any) -> None:
    tried("cursors")
    settings = Settings(log_path="unused")
    query = ListQuery.model_construct(sort=sort, cursor=cursor, limit=50)
    found = attempt(Problem, lambda: page([], query, ANYONE, now=at(1), settings=settings))
    if isinstance(found, Problem):
        assert found.name == "invalid-request"
        assert MARK not in (found.detail or "")
    else:
        assert found["episodes"] == []


_AS_OF: TypeAdapter[int | datetime] = TypeAdapter(AsOf)


@examples(300)
@given(_times | st.integers().map(str) | st.from_regex(r"[0-9\u0660-\u0669]{1,25}", fullmatch=True))
def test_as_of(text: Any) -> None:
    tried("as_of")
    value = attempt(ValidationError, lambda: _AS_OF.validate_python(text))
    if isinstance(value, ValidationError):
        assert all(MARK not in e["msg"] for e in value.errors())
        return
    assert value.tzinfo is UTC if isinstance(value, datetime) else 1 <= value < 10**18


_header = st.text(st.characters(max_codepoint=255), max_size=60)


@examples(300)
@given(_header | st.lists(st.sampled_from(['W/"a"', '"a"', "*", ",", " ", '"']), max_size=9)
       .map("".join))  # fmt: skip
def test_entity_tags(header: str) -> None:
    tried("entity tags")
    tags = {tag.strip().removeprefix("W/") for tag in header.split(",")}
    assert _matches(header, '"a"') == bool(tags & {'"a"', "*"})


@examples(300)
@given(_header | st.from_regex(r'wait ?= ?"?[0-9]{1,30}"?(;.*)?', fullmatch=True)
       .filter(str.isascii))  # fmt: skip
def test_preferences(header: str) -> None:
    tried("preferences")
    scope = {"type": "http", "headers": [(b"prefer", header.encode("latin-1", "replace"))]}
    wait = preferred_wait(Request(scope))
    assert wait is None or 0 <= wait < 10**9


_numbers = ["allowed_lateness_hours", "staleness_limit_hours", "future_tolerance_minutes"]
_values_of_settings = ANY | st.floats(min_value=0).map(repr) | st.sampled_from(["none", "[]", "{}"])


@examples(200)
@given(st.sampled_from([*sorted(Settings.model_fields), "unknown"]), _values_of_settings)
def test_settings(name: str, value: Any) -> None:
    """A value is refused when it is read, or does whatever is asked of it later."""
    tried("settings")
    try:
        settings = Settings(**{name: value})
    except ValidationError:
        return
    assert settings.allowed_lateness >= timedelta(0)
    assert settings.future_tolerance >= timedelta(0)
    assert settings.staleness_limit is None or settings.staleness_limit >= timedelta(0)
    assert at(1) - settings.allowed_lateness < at(2) + settings.future_tolerance


_lines = st.lists(
    st.tuples(st.sampled_from(["LLM4EHR_PORT", "LLM4EHR_HOST", "LLM4EHR_" + MARK, "PATH", "="]),
              st.sampled_from(["=", " ", "==", ": "]), marked | st.integers().map(str)),
    max_size=5,
)  # fmt: skip


@examples(100)
@given(_lines.map(lambda lines: "\n".join(map("".join, lines)).encode("utf-8", "replace"))
       | st.binary(max_size=80))  # fmt: skip
def test_files_of_settings(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    tried("settings files")
    path = tmp_path_factory.getbasetemp() / "fuzzed.env"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM4EHR_SETTINGS_FILE", str(path))
        try:
            Settings()
        except ValueError:  # so is pydantic's own, and that of bytes that are no text
            return
