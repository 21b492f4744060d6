"""The 11 time-series variables: units, limits, normal values, codes, conversions.

Hard limits and normal values are those of the MIMIC-III benchmark (Harutyunyan et al. 2019); where
its two tables of normal values disagree (temperature, GCS) we follow ``discretizer_config.json``.
Plausibility limits are ours, close to the published outlier tables of ricu and CLIF: a value
outside them is possible, so it is kept and flagged. Limits include both ends.

A unit is never guessed where a wrong guess could hide: glucose (mg/dL or mmol/L) and pressures
(mmHg or kPa) must carry one.

Codes are LOINC numbers (loinc.org, copyright Regenstrief Institute) and numbers of MDC, the
ISO/IEEE 11073-10101 nomenclature: 32 bits (partition * 65536 + term), or the term alone when the
partition is 2 (physiological measurements).

Error messages never repeat what was sent, so they can be logged.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, TypeVar

UnitErrorReason = Literal[
    "unit-unknown", "unit-missing", "unit-not-convertible", "value-out-of-range"
]
CodeErrorReason = Literal["code-unknown", "code-refused", "unknown-variable"]
PlausibilityFlag = Literal["implausible-low", "implausible-high"]

LOINC_SYSTEM: Final = "http://loinc.org"
MDC_SYSTEM: Final = "urn:iso:std:iso:11073:10101"

PREFERRED: Final = 0
FALLBACK: Final = 1

_K = TypeVar("_K", str, int)


class UnitError(ValueError):
    """A unit that is missing, unknown or of another kind of quantity, or a result out of range."""

    def __init__(self, reason: UnitErrorReason, message: str) -> None:
        super().__init__(message)
        self.reason: UnitErrorReason = reason


class CodeError(LookupError):
    """A code or a name that stands for none of the variables."""

    def __init__(self, reason: CodeErrorReason, message: str) -> None:
        super().__init__(message)
        self.reason: CodeErrorReason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """An accepted unit: canonical value = (value - zero) * multiply / divide.

    A quotient keeps round values exact: 21 % becomes 0.21 and 98.6 degF becomes 37. ``inferred``
    is the closed range of values, in this unit, for which a missing unit is taken to be this one;
    None means never. The ranges of one variable are disjoint.
    """

    ucum: str
    aliases: tuple[str, ...] = ()
    zero: float = 0.0
    multiply: float = 1.0
    divide: float = 1.0
    inferred: tuple[float, float] | None = None

    def to_canonical(self, value: float) -> float:
        """Convert a value of this unit into the variable's canonical unit."""
        return (value - self.zero) * self.multiply / self.divide


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """One column of the grid.

    ``units[0]`` is the canonical unit: limits and the normal value are in it. Fallback codes stand
    for a cuff, a peripheral site or another specimen, used where nothing better was measured.
    """

    name: str
    title: str
    units: tuple[Unit, ...]
    low: float
    high: float
    normal: float
    plausible_low: float
    plausible_high: float
    loinc: str
    """The code that the FHIR vital signs fix, or for laboratory values the commonest."""
    loinc_also: tuple[str, ...] = ()
    loinc_fallback: tuple[str, ...] = ()
    mdc: tuple[int, ...] = ()
    mdc_fallback: tuple[int, ...] = ()
    unit_optional: bool = False
    """Only one unit is in use, so a missing one leaves nothing to infer."""

    @property
    def unit(self) -> str:
        """The canonical unit (UCUM)."""
        return self.units[0].ucum


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """A value in canonical units, and whether its unit was read off the value itself."""

    value: float
    unit_inferred: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """What a code stands for. ``priority`` is PREFERRED (0) or FALLBACK (1)."""

    variable: Variable
    priority: int


# fmt: off
_PRESSURE: Final = (
    Unit(ucum="mm[Hg]", aliases=("mmHg", "mm(Hg)", "Torr")),
    # A conventional millimetre of mercury is exactly 133.322387415 Pa.
    Unit(ucum="kPa", divide=0.133322387415),
)
_PER_MINUTE: Final = ("1/min", "min-1", "min^-1", "per minute", "bpm")
_HEART_RATE: Final = (
    Unit(ucum="/min", aliases=(
        *_PER_MINUTE, "{beats}/min", "{beat}/min", "{H.B.}/min", "beats/min", "beats/minute",
        "beats per minute",
    )),
)
_RESPIRATORY_RATE: Final = (
    Unit(ucum="/min", aliases=(
        *_PER_MINUTE, "rpm", "{breaths}/min", "{breath}/min", "breaths/min", "breaths/minute",
        "breaths per minute", "insp/min", "resp/min",
    )),
)
# The limits of 26 to 45 degrees Celsius fall into three ranges that lie far apart.
_TEMPERATURE: Final = (
    Unit(
        ucum="Cel", aliases=("C", "°C", "\N{DEGREE CELSIUS}", "degC", "deg C", "Celsius"),
        inferred=(26.0, 45.0),
    ),
    Unit(
        ucum="[degF]", aliases=("F", "°F", "\N{DEGREE FAHRENHEIT}", "degF", "deg F", "Fahrenheit"),
        zero=32.0, multiply=5.0, divide=9.0, inferred=(78.8, 113.0),
    ),
    Unit(ucum="K", aliases=("Kelvin",), zero=273.15, inferred=(299.15, 318.15)),
)
_INSPIRED_OXYGEN: Final = (
    Unit(ucum="1", aliases=("fraction", "{fraction}"), inferred=(0.21, 1.0)),
    Unit(ucum="%", aliases=("percent",), divide=100.0, inferred=(21.0, 100.0)),
)
_SATURATION: Final = (
    Unit(ucum="%", aliases=("percent",), inferred=(math.nextafter(1.0, 2.0), 100.0)),
    Unit(ucum="1", aliases=("fraction", "{fraction}"), multiply=100.0, inferred=(0.0, 1.0)),
)
_GLUCOSE: Final = (
    Unit(ucum="mg/dL"),
    Unit(ucum="mmol/L", multiply=18.0156),  # molar mass of C6H12O6: 180.156 g/mol
)
_ACIDITY: Final = (
    Unit(ucum="[pH]", aliases=("pH", "1", "{pH}", "unit", "units", "pH unit", "pH units")),
)
_SCORE: Final = (Unit(ucum="{score}", aliases=("1", "score", "{points}", "point", "points")),)

VARIABLES: Final[tuple[Variable, ...]] = (
    Variable(
        name="dbp", title="Diastolic blood pressure", units=_PRESSURE,
        low=0.0, high=375.0, normal=59.0, plausible_low=10.0, plausible_high=200.0,
        loinc="8462-4", loinc_also=("76213-8",), loinc_fallback=("76535-4",),
        mdc=(150018, 150034, 150038), mdc_fallback=(150022, 150302),
    ),
    Variable(
        name="sbp", title="Systolic blood pressure", units=_PRESSURE,
        low=0.0, high=375.0, normal=118.0, plausible_low=30.0, plausible_high=300.0,
        loinc="8480-6", loinc_also=("76215-3",), loinc_fallback=("76534-7",),
        mdc=(150017, 150033, 150037), mdc_fallback=(150021, 150301),
    ),
    Variable(
        name="mbp", title="Mean blood pressure", units=_PRESSURE,
        low=14.0, high=330.0, normal=77.0, plausible_low=20.0, plausible_high=250.0,
        loinc="8478-0", loinc_also=("76214-6",), loinc_fallback=("76536-2",),
        mdc=(150019, 150035, 150039), mdc_fallback=(150023, 150303),
    ),
    Variable(
        name="fio2", title="Fraction of inspired oxygen", units=_INSPIRED_OXYGEN,
        low=0.21, high=1.0, normal=0.21, plausible_low=0.21, plausible_high=1.0,
        loinc="3150-0", loinc_also=("19994-3", "71835-3"),
        mdc=(152196, 153144),
    ),
    Variable(
        name="hr", title="Heart rate", units=_HEART_RATE, unit_optional=True,
        low=0.0, high=350.0, normal=86.0, plausible_low=20.0, plausible_high=300.0,
        loinc="8867-4", loinc_also=("76282-3",), loinc_fallback=("8889-8",),
        mdc=(147842,), mdc_fallback=(149514, 149522, 149530, 149546),
    ),
    Variable(
        name="temp", title="Body temperature", units=_TEMPERATURE,
        low=26.0, high=45.0, normal=36.6, plausible_low=32.0, plausible_high=42.0,
        loinc="8310-5", loinc_fallback=("8328-7",),
        loinc_also=("8329-5", "8331-1", "8332-9", "8333-7", "8334-5", "60834-9"),
        mdc=(150364, 150368, 150372, 150392, 188420, 188424, 188428, 188436),
        mdc_fallback=(188452,),
    ),
    Variable(
        name="ph", title="Blood pH", units=_ACIDITY, unit_optional=True,
        low=6.3, high=8.4, normal=7.4, plausible_low=6.8, plausible_high=7.8,
        loinc="2744-1", loinc_also=("11558-4",), loinc_fallback=("2745-8", "2746-6"),
    ),
    Variable(
        name="rr", title="Respiratory rate", units=_RESPIRATORY_RATE, unit_optional=True,
        low=0.0, high=300.0, normal=19.0, plausible_low=4.0, plausible_high=60.0,
        loinc="9279-1",
        mdc=(151562, 151570, 151578, 151594),
    ),
    # US Core wants both 59408-5 and 2708-6 on a pulse oximetry, so neither is a fallback.
    Variable(
        name="spo2", title="Oxygen saturation", units=_SATURATION,
        low=0.0, high=100.0, normal=98.0, plausible_low=50.0, plausible_high=100.0,
        loinc="59408-5", loinc_also=("2708-6",), loinc_fallback=("20564-1",),
        mdc=(150456,), mdc_fallback=(150324,),
    ),
    Variable(
        name="glucose", title="Blood glucose", units=_GLUCOSE,
        low=33.0, high=2000.0, normal=128.0, plausible_low=33.0, plausible_high=1000.0,
        loinc="2345-7", loinc_also=("2339-0", "14749-6", "15074-8"),
        loinc_fallback=("2340-8", "14743-9", "32016-8", "41653-7"),
        mdc=(160192, 160196, 160200, 160204), mdc_fallback=(160184, 160188),
    ),
    Variable(
        name="gcs_total", title="Glasgow coma score, total", units=_SCORE, unit_optional=True,
        low=3.0, high=15.0, normal=15.0, plausible_low=3.0, plausible_high=15.0,
        loinc="9269-2",
        mdc=(153728,),
    ),
)
# fmt: on

VARIABLE_INDEX: Final[Mapping[str, int]] = MappingProxyType(
    {variable.name: index for index, variable in enumerate(VARIABLES)}
)

_URINE_GLUCOSE: Final = "glucose in urine, not in blood"
_URINE_PH: Final = "pH of urine, not of blood"
_COMPONENT: Final = "one component of the coma score; send the total (9269-2)"
_PULMONARY: Final = "pulmonary artery pressure, not systemic"

# Codes that look close enough to be mapped by mistake: another quantity would enter the grid.
REFUSED_LOINC: Final[Mapping[str, str]] = MappingProxyType(
    {
        "85354-9": "a blood pressure panel has no value of its own; send its components",
        "3151-8": "an oxygen flow is not a fraction of inspired oxygen",
        "39106-0": "skin temperature, not body temperature",
        "2756-5": _URINE_PH,
        "5803-2": _URINE_PH,
        "2748-2": "pH of a body fluid other than blood",
        "2711-0": "venous oxygen saturation, not arterial",
        "2350-7": _URINE_GLUCOSE,
        "5792-7": _URINE_GLUCOSE,
        "2342-4": "glucose in cerebrospinal fluid, not in blood",
        "9267-6": _COMPONENT,
        "9268-4": _COMPONENT,
        "9270-0": _COMPONENT,
    }
)
REFUSED_MDC: Final[Mapping[int, str]] = MappingProxyType(
    {
        150045: _PULMONARY,
        150046: _PULMONARY,
        150047: _PULMONARY,
        150087: "central venous pressure, not arterial",
        150388: "skin temperature, not body temperature",
        159844: _URINE_PH,
        159860: _URINE_GLUCOSE,
    }
)

_LOINC_SYSTEMS: Final = frozenset(
    {LOINC_SYSTEM, "http://loinc.org/", "loinc", "ln", "urn:oid:2.16.840.1.113883.6.1"}
)
_MDC_SYSTEMS: Final = frozenset({MDC_SYSTEM, "mdc", "urn:oid:2.16.840.1.113883.6.24"})
_LOINC_SHAPE: Final = re.compile(r"[0-9]{1,7}-[0-9]")
_MDC_SHAPE: Final = re.compile(r"[0-9]{1,10}")
_MDC_TERM_MAX: Final = 0xFFFF
_MDC_PARTITION_2: Final = 2 << 16


def _fold(unit: str) -> str:
    """Ignore case and spacing: within one variable no two units differ in these alone."""
    return "".join(unit.split()).casefold()


_UNITS: Final[Mapping[str, Mapping[str, Unit]]] = {
    variable.name: {_fold(s): unit for unit in variable.units for s in (unit.ucum, *unit.aliases)}
    for variable in VARIABLES
}
_ALL_UNITS: Final = frozenset(spelling for units in _UNITS.values() for spelling in units)

_BY_LOINC: Final[Mapping[str, Code]] = {
    code: Code(variable=variable, priority=priority)
    for variable in VARIABLES
    for priority, codes in (
        (PREFERRED, (variable.loinc, *variable.loinc_also)),
        (FALLBACK, variable.loinc_fallback),
    )
    for code in codes
}
_BY_MDC: Final[Mapping[int, Code]] = {
    code: Code(variable=variable, priority=priority)
    for variable in VARIABLES
    for priority, codes in ((PREFERRED, variable.mdc), (FALLBACK, variable.mdc_fallback))
    for code in codes
}


def convert(variable: Variable, value: float, unit: str | None) -> Converted:
    """Bring a value into the variable's canonical unit. Limits are not checked here.

    A missing or blank ``unit`` is inferred where only one unit can have produced the value.
    Raises UnitError (``unit-missing``, ``unit-unknown``, ``unit-not-convertible``), and ValueError
    for NaN and infinity.
    """
    if not math.isfinite(value):
        raise ValueError(f"{variable.name}: the value is not a finite number")
    spelling = _fold(unit or "")
    if not spelling:
        return _convert_without_unit(variable, value)
    found = _UNITS[variable.name].get(spelling)
    if found is not None:
        return Converted(value=found.to_canonical(value), unit_inferred=False)
    if spelling in _ALL_UNITS:
        raise UnitError(
            "unit-not-convertible", f"the unit measures another quantity; {_accepted(variable)}"
        )
    raise UnitError("unit-unknown", f"the unit is not known; {_accepted(variable)}")


def _convert_without_unit(variable: Variable, value: float) -> Converted:
    if variable.unit_optional:
        return Converted(value=variable.units[0].to_canonical(value), unit_inferred=False)
    for unit in variable.units:
        if unit.inferred is not None and unit.inferred[0] <= value <= unit.inferred[1]:
            return Converted(value=unit.to_canonical(value), unit_inferred=True)
    raise UnitError("unit-missing", f"the value does not tell its unit; {_accepted(variable)}")


def _accepted(variable: Variable) -> str:
    return f"{variable.name} is accepted in {', '.join(unit.ucum for unit in variable.units)}"


def resolve_name(name: str) -> Variable:
    """Return the variable of exactly this name, or raise CodeError (``unknown-variable``)."""
    index = VARIABLE_INDEX.get(name)
    if index is None:
        raise CodeError("unknown-variable", f"the variables are {', '.join(VARIABLE_INDEX)}")
    return VARIABLES[index]


def resolve_code(code: str, system: str | None) -> Code:
    """Find the variable that a LOINC or MDC code measures.

    Without a ``system`` a LOINC number and a 32-bit MDC number are known by their form; an MDC
    term alone is not, since many a local code looks like it. Raises CodeError: ``code-refused``
    for a code known to mean something else, ``code-unknown`` for every other code and system.
    """
    code = code.strip()
    kind = (system or "").strip().casefold()
    if kind in _LOINC_SYSTEMS or (not kind and _LOINC_SHAPE.fullmatch(code)):
        return _look_up(code, _BY_LOINC, REFUSED_LOINC)
    if kind in _MDC_SYSTEMS or not kind:
        return _look_up(_mdc_number(code, term_allowed=bool(kind)), _BY_MDC, REFUSED_MDC)
    raise CodeError("code-unknown", "the code system is neither LOINC nor MDC")


def _mdc_number(code: str, *, term_allowed: bool) -> int:
    """Return the 32-bit form of an MDC code, or -1 where ``code`` is none."""
    if _MDC_SHAPE.fullmatch(code) is None:
        return -1
    number = int(code)
    if number > _MDC_TERM_MAX:
        return number
    return _MDC_PARTITION_2 + number if term_allowed else -1


def _look_up(key: _K, accepted: Mapping[_K, Code], refused: Mapping[_K, str]) -> Code:
    found = accepted.get(key)
    if found is not None:
        return found
    if key in refused:
        raise CodeError("code-refused", f"the code is refused: {refused[key]}")
    raise CodeError("code-unknown", "the code measures none of the variables")


def within_limits(variable: Variable, value: float) -> bool:
    """Tell whether a value in canonical units is possible at all; NaN is not."""
    return variable.low <= value <= variable.high


def plausibility_flag(variable: Variable, value: float) -> PlausibilityFlag | None:
    """Flag a value in canonical units that is possible but rarely true."""
    if value < variable.plausible_low:
        return "implausible-low"
    if value > variable.plausible_high:
        return "implausible-high"
    return None
