"""Validation of items: every bad one by its name, every good one beside it kept."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

import pytest

from llm4ehr.variables import UnitError
from service.core import Entry
from service.ingest import Batch, ItemResult, Known, Rules, Validator
from service.log.rows import number
from service.times import TimeError, format_time, parse_time
from service.units import canonical_code, convert_event
from tests.service.fakes import T0, VOCABULARY, at, creatinine, hr, stamp

RULES = Rules(
    vocabulary=VOCABULARY,
    future_tolerance=timedelta(minutes=5),
    allowed_lateness=timedelta(hours=2),
)


def validator(
    now: float = 300, discharged: float | None = None, stored: list[Entry] | None = None
) -> Validator:
    rows = stored or []
    known = Known(
        admitted_at=T0,
        discharged_at=None if discharged is None else at(discharged),
        seq=1 + len(rows),
        by_id={e.item_id: e for e in rows if e.item_id},
        by_content={e.payload["content"]: e for e in rows},
    )
    return Validator(known, RULES, at(now))


def one(item: Any, list_: str = "observations", **known: Any) -> ItemResult:
    """Judge one item between two good ones, which must be kept."""
    check = validator(**known)
    before, after = {
        "observations": (hr(71, id="before"), hr(72, id="after")),
        "events": (creatinine(0.1, id="before"), creatinine(0.2, id="after")),
        "withdrawals": ({"withdraws": "x"}, {"withdraws": "y"}),
    }[list_]
    check.check(Batch(**{list_: [before, item, after]}))
    first, result, last = check.results
    assert first.status == last.status == "accepted"
    return result


def error_of(item: Any, list_: str = "observations", **known: Any) -> str:
    result = one(item, list_, **known)
    assert result.status == "rejected"
    assert result.error is not None
    assert result.seq is None
    return result.error.type


GLUCOSE = {"variable": "glucose", "value": 100, "time": stamp(0.5)}

BAD_OBSERVATIONS: list[tuple[str, Any]] = [
    ("item-not-an-object", None),
    ("item-not-an-object", 7),
    ("item-not-an-object", "hr 80"),
    ("item-not-an-object", [hr()]),
    ("unknown-field", hr(patient="x")),
    ("unknown-field", hr(display="x")),
    ("unknown-variable", hr(variable="pulse")),
    ("unknown-variable", hr(variable="HR")),
    ("unknown-variable", hr(variable=None)),
    ("unknown-variable", hr(variable=11)),
    ("unknown-variable", hr(code="8867-4")),
    ("unknown-variable", hr(system="http://loinc.org")),
    ("code-unknown", hr(variable=None, code="99999-9")),
    ("code-unknown", hr(variable=None, code="8867-4", system="http://snomed.info/sct")),
    ("code-unknown", hr(variable=None, code=8867)),
    ("code-unknown", hr(variable=None, code="")),
    ("code-unknown", hr(variable=None, code="8" * 1000)),
    ("code-unknown", hr(variable=None, code="8867-4", system=7)),
    ("code-refused", hr(variable=None, code="85354-9")),
    ("code-refused", hr(variable=None, code="5792-7", system="http://loinc.org")),
    ("unit-unknown", GLUCOSE | {"unit": "bananas"}),
    ("unit-unknown", GLUCOSE | {"unit": 7}),
    ("unit-unknown", GLUCOSE | {"unit": "m" * 1000}),
    ("unit-missing", GLUCOSE),
    ("unit-missing", GLUCOSE | {"unit": ""}),
    ("unit-missing", {"variable": "sbp", "value": 120, "time": stamp(0.5)}),
    ("unit-not-convertible", GLUCOSE | {"unit": "kPa"}),
    ("unit-not-convertible", hr(unit="mm[Hg]")),
    ("value-missing", {"variable": "hr", "time": stamp(0.5)}),
    ("value-missing", hr(None)),
    ("value-not-a-number", hr("80")),
    ("value-not-a-number", hr(True)),
    ("value-not-a-number", hr([80])),
    ("value-not-a-number", hr({"value": 80})),
    ("value-not-finite", hr(math.nan)),
    ("value-not-finite", hr(math.inf)),
    ("value-not-finite", hr(-math.inf)),
    ("value-not-finite", hr(10**400)),
    ("value-out-of-range", hr(351)),
    ("value-out-of-range", hr(-1)),
    ("value-out-of-range", {"variable": "temp", "value": 20, "unit": "Cel", "time": stamp(0)}),
    ("time-missing", {"variable": "hr", "value": 80}),
    ("time-missing", hr() | {"time": None}),
    ("time-invalid", hr() | {"time": 1772352000}),
    ("time-invalid", hr() | {"time": "yesterday"}),
    ("time-invalid", hr() | {"time": "2026-03-01"}),
    ("time-invalid", hr() | {"time": "2026-02-30T08:00:00Z"}),
    ("time-invalid", hr() | {"time": "2026-W09-7T08:00:00Z"}),
    ("time-invalid", hr(available_at="soon")),
    ("time-naive", hr() | {"time": "2026-03-01T08:00:00"}),
    ("time-naive", hr(available_at="2026-03-01T08:00:00")),
    ("before-admission", hr(hours=-0.001)),
    ("before-admission", hr(hours=-2, available_at=stamp(-1))),
    ("in-the-future", hr(hours=1.1) | {}),
    ("beyond-horizon", hr(hours=200)),
    ("beyond-horizon", hr(hours=1, available_at=stamp(200))),
    ("id-invalid", hr(id="")),
    ("id-invalid", hr(id=7)),
    ("id-invalid", hr(id="a b")),
    ("id-invalid", hr(id="x" * 129)),
    ("id-invalid", hr(id="ü")),
    ("id-invalid", hr(id="sha256:00")),
    ("id-invalid", hr(corrects=["a"])),
    ("id-invalid", hr(id="a", corrects="a")),
]


@pytest.mark.parametrize(("expected", "item"), BAD_OBSERVATIONS)
def test_bad_observations_are_refused_by_name(expected: str, item: Any) -> None:
    assert error_of(item, now=1 if expected == "in-the-future" else 300) == expected


def test_after_the_discharge_is_refused_by_name() -> None:
    assert error_of(hr(hours=2.001), discharged=2) == "after-discharge"
    assert error_of(hr(hours=1, available_at=stamp(3)), discharged=2) == "after-discharge"
    assert one(hr(hours=2), discharged=2).status == "accepted"


@pytest.mark.parametrize(
    ("expected", "item"),
    [
        ("item-not-an-object", 1),
        ("unknown-field", creatinine(variable="hr")),
        ("code-unknown", creatinine(code=None)),
        ("code-unknown", creatinine(code="two words")),
        ("display-invalid", creatinine(display=7)),
        ("display-invalid", creatinine(display="x" * 257)),
        ("unit-missing", creatinine(unit=None)),
        ("unit-not-convertible", creatinine(unit="U/L")),
        ("unit-unknown", creatinine(unit="spoons")),
        ("value-not-a-number", creatinine("positive")),
        ("value-not-finite", creatinine(math.nan)),
        ("time-missing", {"code": "2160-0"}),
        ("time-naive", creatinine() | {"time": "2026-03-01T08:00:00"}),
        ("before-admission", creatinine(hours=-1)),
        ("beyond-horizon", creatinine(hours=250)),
        ("id-invalid", creatinine(id={})),
    ],
)
def test_bad_events_are_refused_by_name(expected: str, item: Any) -> None:
    assert error_of(item, "events") == expected


@pytest.mark.parametrize(
    ("expected", "item"),
    [
        ("item-not-an-object", "a"),
        ("unknown-field", {"withdraws": "a", "time": stamp(0)}),
        ("id-invalid", {}),
        ("id-invalid", {"withdraws": ""}),
        ("id-invalid", {"withdraws": 3}),
        ("id-invalid", {"withdraws": "a", "id": "a"}),
    ],
)
def test_bad_withdrawals_are_refused_by_name(expected: str, item: Any) -> None:
    assert error_of(item, "withdrawals") == expected


def test_no_message_repeats_what_was_sent() -> None:
    canary = "CANARY"
    items = [
        hr(canary),
        hr(variable=canary),
        hr(id=f"{canary} {canary}"),
        hr(unit=canary),
        hr(variable=None, code=canary),
        hr(variable=None, code="8867-4", system=canary),
        hr() | {"time": canary},
        hr() | {canary: 1},
        hr(123456789),
        hr(corrects=f"{canary} "),
    ]
    check = validator()
    check.check(Batch(observations=items, events=[creatinine(unit=canary), creatinine(canary)]))
    assert {r.status for r in check.results} == {"rejected"}
    for result in check.results:
        assert result.error is not None
        assert canary not in result.error.detail
        assert "123456789" not in result.error.detail


def test_values_are_kept_in_canonical_units_beside_what_was_said() -> None:
    check = validator()
    said = {"code": "8480-6", "system": "http://loinc.org", "value": 16, "unit": "kPa"}
    check.check(Batch(observations=[said | {"time": stamp(1)}]))
    [draft] = check.drafts
    assert draft.payload["variable"] == "sbp"
    assert draft.payload["value"] == pytest.approx(120.0098654)
    assert draft.payload["original"] == said | {"value": 16.0}
    assert draft.payload["priority"] == 0
    assert draft.effective_at == at(1)


def test_a_cuff_is_second_to_an_arterial_line() -> None:
    check = validator()
    cuff = {"code": "76534-7", "value": 120, "unit": "mmHg", "time": stamp(1)}
    check.check(Batch(observations=[cuff, cuff | {"code": "150021"}, cuff | {"code": "76215-3"}]))
    assert [d.payload["priority"] for d in check.drafts] == [1, 1, 0]


@pytest.mark.parametrize(
    ("flag", "item"),
    [
        ("implausible-high", hr(320)),
        ("implausible-low", hr(5)),
        ("unit-inferred", {"variable": "temp", "value": 98.6, "time": stamp(1)}),
        ("unit-inferred", {"variable": "fio2", "value": 40, "time": stamp(1)}),
        ("available-before-effective", hr(hours=2, available_at=stamp(1))),
    ],
)
def test_doubtful_but_possible_items_are_kept_and_flagged(flag: str, item: Any) -> None:
    result = one(item)
    assert result.status == "accepted"
    assert result.flags == (flag,)


def test_availability_never_precedes_the_fact() -> None:
    check = validator()
    check.check(Batch(observations=[hr(hours=2, available_at=stamp(1))]))
    assert check.drafts[0].available_at == at(2)


def test_a_lab_drawn_before_admission_counts_when_its_result_comes() -> None:
    assert one(creatinine(hours=-1, available_at=stamp(0.5)), "events").status == "accepted"


def test_an_hour_ends_before_the_horizon_and_the_clocks_may_differ_a_little() -> None:
    assert one(hr(hours=199.999)).status == "accepted"
    assert one(hr(hours=1 + 5 / 60), now=1).status == "accepted"
    assert error_of(hr(hours=1 + 5.01 / 60), now=1) == "in-the-future"


def test_events_the_model_does_not_know_are_kept_and_flagged() -> None:
    result = one({"code": "x-1", "value": 3, "unit": "furlongs", "time": stamp(1)}, "events")
    assert result.flags == ("not-in-vocabulary",)


def test_event_values_are_kept_as_they_were_sent() -> None:
    check = validator()
    drug = {"code": "40617009", "system": "http://snomed.info/sct", "time": stamp(1)}
    check.check(Batch(events=[creatinine(88.4, unit="umol/L"), creatinine(None, unit=None), drug]))
    first, second, third = (d.payload for d in check.drafts)
    assert (first["value"], first["unit"]) == (88.4, "umol/L")
    assert (second["value"], second["unit"]) == (None, None)
    assert third["code"] == "SNOMED/40617009"


def test_a_value_that_overflows_in_the_unit_of_the_model_is_refused_alone() -> None:
    check = validator()
    check.check(Batch(observations=[hr()], events=[creatinine(1e308, unit="g/dL")]))
    assert [r.status for r in check.results] == ["accepted", "rejected"]
    error = check.results[1].error
    assert error is not None
    assert error.type == "value-out-of-range"


def kept(*drafts: Any) -> list[Entry]:
    return number("e", 1, drafts, T0)


def test_the_same_again_is_a_duplicate_with_the_first_number() -> None:
    first = validator()
    items = [hr(id="a"), hr(81), hr(82, hours=1)]
    first.check(Batch(observations=items, withdrawals=[{"withdraws": "a"}]))
    again = validator(stored=kept(*first.drafts))
    again.check(Batch(observations=items[::-1], withdrawals=[{"withdraws": "a"}]))
    assert [r.status for r in again.results] == ["duplicate"] * 4
    assert [r.seq for r in again.results] == [4, 3, 2, 5]
    assert again.drafts == []


def test_duplicates_within_one_request() -> None:
    check = validator()
    check.check(Batch(observations=[hr(id="a"), hr(id="a"), hr(), hr(81, id="a"), hr()]))
    assert [(r.status, r.seq) for r in check.results] == [
        ("accepted", 2),
        ("duplicate", 2),
        ("duplicate", 2),
        ("rejected", None),
        ("duplicate", 2),
    ]


def test_content_is_judged_by_meaning_not_by_spelling() -> None:
    first = validator()
    first.check(Batch(observations=[hr(80)]))
    again = validator(stored=kept(*first.drafts))
    again.check(Batch(observations=[hr(80.0) | {"time": "2026-03-01T10:30:00.000+02:00"}]))
    assert again.results[0].status == "duplicate"


@pytest.mark.parametrize(
    "other",
    [
        hr(81, id="a"),
        hr(hours=0.6, id="a"),
        hr(id="a", unit="/min"),
        hr(id="a", available_at=stamp(0.7)),
        hr(id="a", corrects="b"),
        hr(id="a", variable="rr"),
    ],
)
def test_one_id_cannot_say_two_things(other: Any) -> None:
    first = validator()
    first.check(Batch(observations=[hr(id="a")]))
    again = validator(stored=kept(*first.drafts))
    again.check(
        Batch(observations=[other], events=[creatinine(id="a")], withdrawals=[{"id": "a"} | WD])
    )
    assert [r.error.type for r in again.results if r.error] == ["id-conflict"] * 3
    assert {r.item_id for r in again.results} == {"a"}


WD = {"withdraws": "z"}


def test_a_resend_is_a_duplicate_even_where_it_would_no_longer_be_accepted() -> None:
    first = validator()
    first.check(Batch(observations=[hr(id="a", hours=5), hr(hours=6)]))
    later = validator(discharged=2, stored=kept(*first.drafts))
    later.check(Batch(observations=[hr(id="a", hours=5), hr(hours=6), hr(hours=7)]))
    assert [r.status for r in later.results] == ["duplicate", "duplicate", "rejected"]


def test_targets_may_come_before_with_or_after() -> None:
    check = validator()
    check.check(
        Batch(
            observations=[hr(81, id="b", corrects="a"), hr(id="a"), hr(9, corrects="nobody")],
            events=[creatinine(corrects="a")],
            withdrawals=[{"withdraws": "b"}, {"withdraws": "gone"}, {"id": "w", "withdraws": "a"}],
        )
    )
    assert [r.status for r in check.results] == ["accepted"] * 7
    assert [check.target_known(r) for r in check.results] == [
        *[True, None, False],
        True,
        *[True, False, True],
    ]
    check.check(Batch(withdrawals=[{"withdraws": "w"}]))
    assert check.target_known(check.results[-1]) is False  # a withdrawal is not withdrawn


def test_a_correction_waits_for_the_availability_of_its_target() -> None:
    assert one(hr(hours=-1, corrects="a")).status == "accepted"
    assert error_of(hr(hours=-1, corrects="a", available_at=stamp(-0.5))) == "before-admission"


def test_lateness_is_judged_by_the_hour() -> None:
    assert not one(hr(hours=0.5), now=2.99).late
    assert one(hr(hours=0.5), now=3).late
    assert not one(hr(hours=0.5, available_at=stamp(2.9)), now=3).late


@pytest.mark.parametrize(
    ("code", "system", "canonical"),
    [
        ("2160-0", None, "LOINC/2160-0"),
        ("2160-0", "http://loinc.org/", "LOINC/2160-0"),
        ("2160-0", "LOINC", "LOINC/2160-0"),
        ("LOINC/2160-0", None, "LOINC/2160-0"),
        ("C01CA03", "http://www.whocc.no/atc", "ATC/C01CA03"),
        ("7512", "http://www.nlm.nih.gov/research/umls/rxnorm", "RXNORM/7512"),
        ("vent", None, "LOCAL/vent"),
        ("a/b", None, "LOCAL/a/b"),
        ("1", "https://hospital.example/codes", "https://hospital.example/codes/1"),
        ("1", "urn:oid:2.16.840.1.113883.6.96", "SNOMED/1"),
    ],
)
def test_event_codes_have_one_spelling(code: str, system: str | None, canonical: str) -> None:
    assert canonical_code(code, system) == canonical


@pytest.mark.parametrize(
    ("code", "value", "unit", "to", "expected"),
    [
        ("X", 10.0, "kPa", "mm[Hg]", 75.00615758456563),
        ("X", 7.0, "10*9/L", "10*3/uL", 7.0),
        ("X", 7.0, "K/uL", "10*9/L", 7.0),
        ("X", 7.0, "x10^9/L", "10*9/L", 7.0),
        ("X", 10.0, "g/L", "g/dL", 1.0),
        ("X", 30.0, "IU/L", "U/L", 30.0),
        ("X", 30.0, "mIU/mL", "[IU]/L", 30.0),
        ("X", 0.45, "1", "%", 45.0),
        ("X", 0.45, "L/L", "%", 45.0),
        ("X", 3.0, "{score}", "1", 3.0),
        ("X", 0.1, "ug/kg/min", "ug/kg/h", 6.0),
        ("X", 5.0, "\u00b5g/l", "ng/mL", 5.0),
        ("X", 100.0, "[lb_av]", "kg", 45.359237),
        ("LOINC/2951-2", 140.0, "mEq/L", "mmol/L", 140.0),
        ("LOINC/2601-3", 2.0, "meq/L", "mmol/L", 1.0),
        ("LOINC/2601-3", 1.0, "mmol/L", "mg/dL", 2.4305),
        ("LOINC/3094-0", 10.0, "mmol/L", "mg/dL", 28.0134),
    ],
)
def test_event_units_convert(code: str, value: float, unit: str, to: str, expected: float) -> None:
    assert convert_event(code, value, unit, to) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("unit", "to", "reason"),
    [
        (None, "mg/dL", "unit-missing"),
        ("  ", "mg/dL", "unit-missing"),
        ("mmol/L", "mg/dL", "unit-not-convertible"),
        ("mg", "mg/dL", "unit-not-convertible"),
        ("%", "U/L", "unit-not-convertible"),
        ("mg/dL/", "mg/dL", "unit-unknown"),
        ("florins", "mg/dL", "unit-unknown"),
    ],
)
def test_event_units_that_do_not(unit: str | None, to: str, reason: str) -> None:
    with pytest.raises(UnitError) as caught:
        convert_event("X", 1.0, unit, to)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("text", "utc"),
    [
        ("2026-03-01T08:00:00Z", "2026-03-01T08:00:00Z"),
        ("2026-03-01t08:00:00.5z", "2026-03-01T08:00:00.500000Z"),
        ("2026-03-01 13:30:00.123456789+05:30", "2026-03-01T08:00:00.123456Z"),
        ("2026-02-28T23:00:00-09:00", "2026-03-01T08:00:00Z"),
    ],
)
def test_times_are_read_as_utc(text: str, utc: str) -> None:
    assert format_time(parse_time(text)) == utc


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("2026-03-01T08:00:00", "time-naive"),
        ("2026-03-01T08:00Z", "time-invalid"),
        ("2026-03-01T08:00:60Z", "time-invalid"),
        ("2026-03-01T08:00:00+24:00", "time-invalid"),
        ("0001-01-01T00:00:00+01:00", "time-invalid"),
        ("２026-03-01T08:00:00Z", "time-invalid"),  # noqa: RUF001
        ("", "time-invalid"),
        (None, "time-invalid"),
    ],
)
def test_other_times_are_not(text: Any, reason: str) -> None:
    with pytest.raises(TimeError) as caught:
        parse_time(text)
    assert caught.value.reason == reason
