"""Units, limits and codes of the 11 variables."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from llm4ehr.variables import (
    FALLBACK,
    LOINC_SYSTEM,
    MDC_SYSTEM,
    PREFERRED,
    REFUSED_LOINC,
    REFUSED_MDC,
    VARIABLE_INDEX,
    VARIABLES,
    CodeError,
    Unit,
    UnitError,
    Variable,
    convert,
    plausibility_flag,
    resolve_code,
    resolve_name,
    within_limits,
)

BY_NAME = {variable.name: variable for variable in VARIABLES}
UNITS = [(variable, unit) for variable in VARIABLES for unit in variable.units]
INFERABLE = [(variable, unit) for variable, unit in UNITS if unit.inferred is not None]
MUST_STATE_UNIT = ("dbp", "sbp", "mbp", "glucose")
UNIT_OPTIONAL = ("hr", "ph", "rr", "gcs_total")


def loinc_codes(variable: Variable) -> tuple[str, ...]:
    return (variable.loinc, *variable.loinc_also, *variable.loinc_fallback)


def mdc_codes(variable: Variable) -> tuple[int, ...]:
    return (*variable.mdc, *variable.mdc_fallback)


def spellings(unit: Unit) -> tuple[str, ...]:
    return (unit.ucum, *unit.aliases)


def outcome(code: str, system: str | None) -> str:
    """The name of the variable, or the reason why there is none."""
    try:
        return resolve_code(code, system).variable.name
    except CodeError as error:
        return error.reason


def from_canonical(unit: Unit, value: float) -> float:
    return value * unit.divide / unit.multiply + unit.zero


# --- the table -----------------------------------------------------------------------------------


def test_column_order_is_fixed() -> None:
    """Stored grids and trained weights rely on this order."""
    assert [variable.name for variable in VARIABLES] == [
        "dbp", "sbp", "mbp", "fio2", "hr", "temp", "ph", "rr", "spo2", "glucose", "gcs_total",
    ]  # fmt: skip
    assert all(VARIABLES[index].name == name for name, index in VARIABLE_INDEX.items())


@pytest.mark.parametrize(
    ("name", "unit", "low", "high", "normal"),
    [
        ("dbp", "mm[Hg]", 0, 375, 59),
        ("sbp", "mm[Hg]", 0, 375, 118),
        ("mbp", "mm[Hg]", 14, 330, 77),
        ("fio2", "1", 0.21, 1, 0.21),
        ("hr", "/min", 0, 350, 86),
        ("temp", "Cel", 26, 45, 36.6),
        ("ph", "[pH]", 6.3, 8.4, 7.4),
        ("rr", "/min", 0, 300, 19),
        ("spo2", "%", 0, 100, 98),
        ("glucose", "mg/dL", 33, 2000, 128),
        ("gcs_total", "{score}", 3, 15, 15),
    ],
)
def test_limits_and_normal_values_are_those_of_the_benchmark(
    name: str, unit: str, low: float, high: float, normal: float
) -> None:
    variable = BY_NAME[name]
    assert (variable.unit, variable.low, variable.high, variable.normal) == (
        unit, low, high, normal,
    )  # fmt: skip


@pytest.mark.parametrize("variable", VARIABLES, ids=lambda variable: variable.name)
def test_plausible_range_lies_within_the_limits_and_holds_the_normal_value(
    variable: Variable,
) -> None:
    assert (
        variable.low
        <= variable.plausible_low
        <= variable.normal
        <= variable.plausible_high
        <= variable.high
    )


@pytest.mark.parametrize("variable", VARIABLES, ids=lambda variable: variable.name)
def test_limits_include_both_ends_and_exclude_nan(variable: Variable) -> None:
    assert within_limits(variable, variable.low)
    assert within_limits(variable, variable.high)
    assert not within_limits(variable, math.nextafter(variable.low, -math.inf))
    assert not within_limits(variable, math.nextafter(variable.high, math.inf))
    assert not within_limits(variable, math.nan)


@pytest.mark.parametrize("variable", VARIABLES, ids=lambda variable: variable.name)
def test_flags_start_just_outside_the_plausible_range(variable: Variable) -> None:
    assert plausibility_flag(variable, variable.plausible_low) is None
    assert plausibility_flag(variable, variable.plausible_high) is None
    below = math.nextafter(variable.plausible_low, -math.inf)
    above = math.nextafter(variable.plausible_high, math.inf)
    assert plausibility_flag(variable, below) == "implausible-low"
    assert plausibility_flag(variable, above) == "implausible-high"


# --- units ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "unit", "expected"),
    [
        ("temp", 98.6, "[degF]", 37.0),
        ("temp", 212.0, "F", 100.0),
        ("temp", -40.0, "°F", -40.0),
        ("temp", 273.15, "K", 0.0),
        ("temp", 37.5, "℃", 37.5),
        ("temp", 37.5, "deg C", 37.5),
        ("fio2", 21.0, "%", 0.21),
        ("fio2", 57.0, "%", 0.57),
        ("fio2", 0.4, "1", 0.4),
        ("spo2", 1.0, "1", 100.0),
        ("spo2", 97.0, "%", 97.0),
        ("sbp", 118.0, "mmHg", 118.0),
        ("sbp", 118.0, " mm hg ", 118.0),
        ("sbp", 118.0, "MMHG", 118.0),
        ("sbp", 118.0, "torr", 118.0),
        ("sbp", 13.3322387415, "kPa", 100.0),
        ("hr", 80.0, "bpm", 80.0),
        ("hr", 80.0, "{beats}/min", 80.0),
        ("rr", 16.0, "breaths/min", 16.0),
        ("rr", 16.0, "bpm", 16.0),
        ("glucose", 90.0, "mg/dl", 90.0),
        ("glucose", 10.0, "mmol/L", 180.156),
        ("glucose", 10.0, "MMOL/L", 180.156),
        ("ph", 7.4, "1", 7.4),
        ("gcs_total", 14.0, "points", 14.0),
    ],
)
def test_declared_unit_is_converted(name: str, value: float, unit: str, expected: float) -> None:
    converted = convert(BY_NAME[name], value, unit)
    assert converted.value == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert not converted.unit_inferred


@pytest.mark.parametrize("percent", range(21, 101))
def test_whole_percents_of_oxygen_are_exact(percent: int) -> None:
    assert convert(BY_NAME["fio2"], float(percent), "%").value == percent / 100


def test_kilopascal_factor_agrees_with_the_published_one() -> None:
    assert convert(BY_NAME["mbp"], 1.0, "kPa").value == pytest.approx(7.50062, abs=5e-6)


@pytest.mark.parametrize(("variable", "unit"), UNITS, ids=lambda item: getattr(item, "name", None))
@given(share=st.floats(0.0, 1.0), data=st.data())
def test_conversion_round_trips(
    variable: Variable, unit: Unit, share: float, data: st.DataObject
) -> None:
    value = variable.low + share * (variable.high - variable.low)
    spelling = data.draw(st.sampled_from(spellings(unit)))
    converted = convert(variable, from_canonical(unit, value), spelling)
    assert converted.value == pytest.approx(value, rel=1e-9, abs=1e-9)
    assert not converted.unit_inferred


@pytest.mark.parametrize(("variable", "unit"), UNITS, ids=lambda item: getattr(item, "name", None))
def test_conversion_rises_with_the_value(variable: Variable, unit: Unit) -> None:
    """So limits of one unit are the limits of every unit."""
    low, high = from_canonical(unit, variable.low), from_canonical(unit, variable.high)
    assert low < high
    assert unit.to_canonical(low) < unit.to_canonical(high)


@pytest.mark.parametrize("variable", VARIABLES, ids=lambda variable: variable.name)
def test_no_spelling_names_two_units(variable: Variable) -> None:
    folded = ["".join(s.split()).casefold() for unit in variable.units for s in {*spellings(unit)}]
    owners = {
        spelling: {
            unit.ucum
            for unit in variable.units
            if spelling in {"".join(s.split()).casefold() for s in spellings(unit)}
        }
        for spelling in folded
    }
    assert all(len(units) == 1 for units in owners.values())


@pytest.mark.parametrize(
    ("name", "unit", "reason"),
    [
        ("sbp", "mg/dL", "unit-not-convertible"),
        ("hr", "1", "unit-not-convertible"),
        ("temp", "bpm", "unit-not-convertible"),
        ("glucose", "%", "unit-not-convertible"),
        ("glucose", "furlong", "unit-unknown"),
        ("fio2", "L/min", "unit-unknown"),
        ("ph", "nmol/L", "unit-unknown"),
        ("temp", "\N{SKULL}", "unit-unknown"),
    ],
)
def test_wrong_unit_is_refused_by_name(name: str, unit: str, reason: str) -> None:
    with pytest.raises(UnitError) as caught:
        convert(BY_NAME[name], 20.0, unit)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    "call",
    [
        lambda sent: convert(BY_NAME["hr"], 80.0, sent),
        lambda sent: resolve_code(sent, "LOINC"),
        lambda sent: resolve_code("8867-4", sent),
        lambda sent: resolve_name(sent),
    ],
)
def test_errors_do_not_repeat_what_was_sent(call: Callable[[str], object]) -> None:
    """They are logged, and a feed may put a patient's name anywhere."""
    with pytest.raises((UnitError, CodeError)) as caught:
        call("Jane Doe")
    assert "Jane" not in str(caught.value)


@pytest.mark.parametrize("variable", VARIABLES, ids=lambda variable: variable.name)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(variable: Variable, value: float) -> None:
    with pytest.raises(ValueError, match="finite") as caught:
        convert(variable, value, variable.unit)
    assert not isinstance(caught.value, UnitError)


# --- missing units -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("fio2", 0.21, 0.21),
        ("fio2", 1.0, 1.0),
        ("fio2", 21.0, 0.21),
        ("fio2", 100.0, 1.0),
        ("temp", 36.6, 36.6),
        ("temp", 98.6, 37.0),
        ("temp", 310.15, 37.0),
        ("spo2", 0.97, 97.0),
        ("spo2", 1.0, 100.0),
        ("spo2", 97.0, 97.0),
    ],
)
@pytest.mark.parametrize("unit", [None, "", "  "])
def test_missing_unit_is_inferred_where_it_is_certain(
    name: str, value: float, expected: float, unit: str | None
) -> None:
    converted = convert(BY_NAME[name], value, unit)
    assert converted.value == pytest.approx(expected, rel=1e-12)
    assert converted.unit_inferred


@given(name=st.sampled_from(MUST_STATE_UNIT), value=st.floats(0.0, 2000.0))
def test_glucose_and_pressure_units_are_never_guessed(name: str, value: float) -> None:
    with pytest.raises(UnitError) as caught:
        convert(BY_NAME[name], value, None)
    assert caught.value.reason == "unit-missing"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temp", 20.0),
        ("temp", 60.0),
        ("temp", 200.0),
        ("fio2", 0.2),
        ("fio2", 5.0),
        ("spo2", -1.0),
        ("spo2", 101.0),
    ],
)
def test_missing_unit_is_refused_between_the_ranges(name: str, value: float) -> None:
    with pytest.raises(UnitError) as caught:
        convert(BY_NAME[name], value, None)
    assert caught.value.reason == "unit-missing"


@given(name=st.sampled_from(UNIT_OPTIONAL), value=st.floats(-1e6, 1e6))
def test_quantities_with_one_unit_need_none(name: str, value: float) -> None:
    converted = convert(BY_NAME[name], value, None)
    assert converted.value == value
    assert not converted.unit_inferred


def test_every_variable_has_a_policy_for_missing_units() -> None:
    inferable = {variable.name for variable, _ in INFERABLE}
    optional = {variable.name for variable in VARIABLES if variable.unit_optional}
    assert optional == set(UNIT_OPTIONAL)
    assert inferable == {"fio2", "temp", "spo2"}
    assert inferable | optional | set(MUST_STATE_UNIT) == set(BY_NAME)


@pytest.mark.parametrize(
    ("variable", "unit"), INFERABLE, ids=lambda item: getattr(item, "name", None)
)
@given(share=st.floats(0.0, 1.0))
def test_inferred_value_is_within_limits_and_equals_the_declared_one(
    variable: Variable, unit: Unit, share: float
) -> None:
    assert unit.inferred is not None
    low, high = unit.inferred
    value = low + share * (high - low)
    assume(low <= value <= high)
    inferred = convert(variable, value, None)
    assert inferred.value == convert(variable, value, unit.ucum).value
    assert within_limits(variable, inferred.value)


@pytest.mark.parametrize("variable", VARIABLES, ids=lambda variable: variable.name)
def test_inferred_ranges_are_disjoint(variable: Variable) -> None:
    ranges = [unit.inferred for unit in variable.units if unit.inferred is not None]
    for (_, high), (low, _) in itertools.pairwise(sorted(ranges)):
        assert high < low


# --- codes ---------------------------------------------------------------------------------------


def test_no_code_maps_to_two_variables_or_is_also_refused() -> None:
    loinc = [code for variable in VARIABLES for code in loinc_codes(variable)]
    mdc = [code for variable in VARIABLES for code in mdc_codes(variable)]
    assert len({*loinc, *REFUSED_LOINC}) == len(loinc) + len(REFUSED_LOINC)
    assert len({*mdc, *REFUSED_MDC}) == len(mdc) + len(REFUSED_MDC)


@pytest.mark.parametrize(
    "code",
    [*itertools.chain.from_iterable(loinc_codes(v) for v in VARIABLES), *REFUSED_LOINC],
)
def test_loinc_check_digits_are_right(code: str) -> None:
    """LOINC numbers end in a Luhn digit, so a mistyped one is caught here."""
    body, check = code.split("-")
    total = 0
    for position, digit in enumerate(reversed(body)):
        doubled = int(digit) * (2 if position % 2 == 0 else 1)
        total += doubled - 9 if doubled > 9 else doubled
    assert int(check) == -total % 10


@pytest.mark.parametrize("system", [LOINC_SYSTEM, "LOINC", "loinc", " LN ", None, ""])
def test_every_loinc_code_resolves(system: str | None) -> None:
    for variable in VARIABLES:
        for code in loinc_codes(variable):
            found = resolve_code(code, system)
            assert found.variable is variable
            assert found.priority == (FALLBACK if code in variable.loinc_fallback else PREFERRED)


@pytest.mark.parametrize("system", [MDC_SYSTEM, "MDC", "mdc"])
def test_mdc_term_is_its_32_bit_number(system: str) -> None:
    for variable in VARIABLES:
        for code in mdc_codes(variable):
            found = resolve_code(str(code), system)
            assert found.variable is variable
            assert found.priority == (FALLBACK if code in variable.mdc_fallback else PREFERRED)
            assert resolve_code(str(code - 2 * 65536), system) == found
            assert resolve_code(str(code), None) == found


def test_mdc_term_alone_needs_its_system() -> None:
    assert resolve_code("18949", "MDC").variable.name == "sbp"
    with pytest.raises(CodeError) as caught:
        resolve_code("18949", None)
    assert caught.value.reason == "code-unknown"


@pytest.mark.parametrize(
    ("code", "system", "priority"),
    [
        ("76215-3", "LOINC", PREFERRED),  # invasive systolic pressure
        ("8480-6", "LOINC", PREFERRED),  # systolic pressure, method unspecified
        ("76534-7", "LOINC", FALLBACK),  # systolic pressure by cuff
        ("150021", "MDC", FALLBACK),
        ("150301", "MDC", FALLBACK),
        ("59408-5", "LOINC", PREFERRED),  # pulse oximetry
        ("150456", "MDC", PREFERRED),
        ("20564-1", "LOINC", FALLBACK),  # blood gas
        ("150324", "MDC", FALLBACK),
        ("41653-7", "LOINC", FALLBACK),  # finger-prick glucose
    ],
)
def test_cuff_and_other_specimens_are_fallbacks(code: str, system: str, priority: int) -> None:
    assert resolve_code(code, system).priority == priority


@pytest.mark.parametrize(
    ("code", "system", "why"),
    [
        ("5792-7", "LOINC", "urine"),
        ("2350-7", "LOINC", "urine"),
        ("5803-2", "LOINC", "urine"),
        ("2756-5", None, "urine"),
        ("2748-2", "LOINC", "other than blood"),
        ("85354-9", "LOINC", "components"),
        ("9268-4", "LOINC", "total"),
        ("150388", "MDC", "skin"),
        ("19316", "MDC", "skin"),
        ("150045", None, "pulmonary"),
    ],
)
def test_look_alike_codes_are_refused_with_the_reason(
    code: str, system: str | None, why: str
) -> None:
    with pytest.raises(CodeError, match=why) as caught:
        resolve_code(code, system)
    assert caught.value.reason == "code-refused"


@pytest.mark.parametrize(
    ("code", "system"),
    [
        ("0000-0", "LOINC"),
        ("8867-4", "http://snomed.info/sct"),
        ("8867-4", "MDC"),
        ("147842", "LOINC"),
        ("heart rate", None),
        ("", None),
        ("-1", "MDC"),
        ("²", "MDC"),
        ("١٤٧٨٤٢", "MDC"),
        ("9" * 10_000, "MDC"),
        ("8867-4\n8867-4", None),
    ],
)
def test_anything_else_is_unknown(code: str, system: str | None) -> None:
    with pytest.raises(CodeError) as caught:
        resolve_code(code, system)
    assert caught.value.reason == "code-unknown"


@given(code=st.text(max_size=40), system=st.none() | st.text(max_size=40))
def test_any_text_resolves_or_is_named(code: str, system: str | None) -> None:
    assert outcome(code, system) in {*BY_NAME, "code-unknown", "code-refused"}


def test_names_resolve_exactly() -> None:
    assert all(resolve_name(variable.name) is variable for variable in VARIABLES)
    for name in ("HR", "heart_rate", " hr", ""):
        with pytest.raises(CodeError) as caught:
            resolve_name(name)
        assert caught.value.reason == "unknown-variable"
