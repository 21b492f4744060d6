"""Canonical codes of clinical events, and conversion of their values to the unit a model was fed.

The unit grammar is the part of UCUM that laboratories and pharmacies use: prefixes, products of
powers of ten, quotients, annotations. Amounts and masses convert into each other only where the
code says which substance it is. The 11 variables have their own table in `llm4ehr.variables`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from types import MappingProxyType
from typing import Literal, Protocol

from llm4ehr.variables import UnitError

_SYSTEMS: Mapping[str, str] = MappingProxyType(
    {
        "http://loinc.org": "LOINC",
        "urn:oid:2.16.840.1.113883.6.1": "LOINC",
        "http://snomed.info/sct": "SNOMED",
        "urn:oid:2.16.840.1.113883.6.96": "SNOMED",
        "http://www.whocc.no/atc": "ATC",
        "http://www.nlm.nih.gov/research/umls/rxnorm": "RXNORM",
        "urn:iso:std:iso:11073:10101": "MDC",
    }
)
_LOINC_SHAPE = re.compile(r"[0-9]{1,7}-[0-9]")


def canonical_code(code: str, system: str | None) -> str:
    """One spelling for an event code: "<SYSTEM>/<code>".

    Without a system, a number of LOINC's form is LOINC, and every other code is LOCAL unless it
    already is in this form.
    """
    if system:
        name = _SYSTEMS.get(system.casefold().rstrip("/"), system)
        return f"{name.upper() if ':' not in name else name}/{code}"
    if _LOINC_SHAPE.fullmatch(code):
        return f"LOINC/{code}"
    known = code.partition("/")[0] in {*_SYSTEMS.values(), "LOCAL"}
    return code if known and "/" in code else f"LOCAL/{code}"


# Molar mass in g/mol and valence, by code: what a unit alone does not tell.
_SUBSTANCES: Mapping[str, tuple[Fraction, int]] = MappingProxyType(
    {
        code: (Fraction(mass), valence)
        for code, mass, valence in (
            ("LOINC/2160-0", "113.118", 0),  # creatinine
            ("LOINC/3094-0", "28.0134", 0),  # urea nitrogen: two N in each urea
            ("LOINC/1975-2", "584.662", 0),  # bilirubin
            ("LOINC/1968-7", "584.662", 0),  # bilirubin, direct
            ("LOINC/2093-3", "386.654", 0),  # cholesterol
            ("LOINC/2524-7", "90.078", 1),  # lactate
            ("LOINC/1963-8", "61.017", 1),  # bicarbonate
            ("LOINC/2823-3", "39.0983", 1),  # potassium
            ("LOINC/2951-2", "22.98977", 1),  # sodium
            ("LOINC/2075-0", "35.453", 1),  # chloride
            ("LOINC/2601-3", "24.305", 2),  # magnesium, reported in mmol
            ("LOINC/19123-9", "24.305", 2),  # magnesium, reported in mg
            ("LOINC/17861-6", "40.078", 2),  # calcium
            ("LOINC/2777-1", "30.97376", 0),  # phosphate, as phosphorus
        )
    }
)

_PREFIXES = {"k": 3, "d": -1, "c": -2, "m": -3, "u": -6, "n": -9, "p": -12}
# Enzyme and hormone units: U and [IU] are used for one another in laboratory reports.
_ATOMS: Mapping[str, tuple[str, Fraction]] = MappingProxyType(
    {
        "g": ("mass", Fraction(1)),
        "[lb_av]": ("mass", Fraction("453.59237")),
        "mol": ("amount", Fraction(1)),
        "eq": ("charge", Fraction(1)),
        "L": ("volume", Fraction(1)),
        "l": ("volume", Fraction(1)),
        "U": ("activity", Fraction(1)),
        "[IU]": ("activity", Fraction(1)),
        "[iU]": ("activity", Fraction(1)),
        "m": ("length", Fraction(1)),
        "[in_i]": ("length", Fraction("0.0254")),
        "Pa": ("pressure", Fraction(1)),
        "m[Hg]": ("pressure", Fraction("133322.387415")),
        "s": ("time", Fraction(1)),
        "min": ("time", Fraction(60)),
        "h": ("time", Fraction(3600)),
        "d": ("time", Fraction(86400)),
    }
)
_SPELLINGS = (
    (re.compile(r"[\u00b5\u03bc]"), "u"),
    (re.compile(r"\s+"), ""),
    (re.compile(r"\{[^{}]*\}"), ""),
    (re.compile(r"(?<![A-Za-z\[])mmHg"), "mm[Hg]"),
    (re.compile(r"(?<![A-Za-z\[])(m|u)?IU"), r"\1[IU]"),
    (re.compile(r"Eq"), "eq"),
    (re.compile(r"^[xX]?10[*^eE]"), "10*"),
    (re.compile(r"^K(?=/)"), "10*3"),
)
_POWER_OF_TEN = re.compile(r"10\*([0-9]{1,2})")

_Dimensions = dict[str, int]


class EventEntry(Protocol):
    """What a model knows of an event code."""

    @property
    def unit(self) -> str | None: ...


class EventVocabulary(Protocol):
    """The event codes of the model in service; `llm4ehr.vocabulary.Vocabulary` is one."""

    def entry(self, code: str) -> EventEntry | None: ...


def convert_event(code: str, value: float, unit: str | None, to: str) -> float:
    """The value of an event in the unit `to` (UCUM).

    Raises UnitError: `unit-missing`, `unit-unknown`, `unit-not-convertible`, or
    `value-out-of-range` where the result is beyond what a float holds.
    """
    if not unit or not unit.strip():
        raise UnitError("unit-missing", f"a unit is required: {to} or one that converts to it")
    if unit.strip() == to:
        return value
    factor = _factor_between(code, unit, to)
    if factor == "unit-unknown":
        raise UnitError("unit-unknown", f"the unit is not known; expected: {to}")
    if factor == "unit-not-convertible":
        raise UnitError("unit-not-convertible", f"the unit does not convert to {to}")
    try:
        converted = value * factor.numerator / factor.denominator
    except OverflowError:
        converted = math.inf
    if not math.isfinite(converted):
        raise UnitError("value-out-of-range", f"too large a number in {to}")
    return converted


# A feed uses few pairs of units; the bound is for feeds that make them up.
@lru_cache(maxsize=4096)
def _factor_between(
    code: str, unit: str, to: str
) -> Fraction | Literal["unit-unknown", "unit-not-convertible"]:
    """What to multiply with, or why there is nothing."""
    given, wanted = _parse(unit), _parse(to)
    if given is None:
        return "unit-unknown"
    factor = None if wanted is None else _factor(code, given, wanted)
    return "unit-not-convertible" if factor is None else factor


def _factor(
    code: str, given: tuple[Fraction, _Dimensions], wanted: tuple[Fraction, _Dimensions]
) -> Fraction | None:
    """What to multiply with; None if the two measure different things."""
    factor = given[0] / wanted[0]
    if given[1] == wanted[1]:
        return factor
    if code in _SUBSTANCES:
        mass, valence = _SUBSTANCES[code]
        grams = {"mass": Fraction(1), "amount": mass}
        if valence:
            grams["charge"] = mass / valence
        for a, grams_given in grams.items():
            for b, grams_wanted in grams.items():
                if _renamed(given[1], a) == _renamed(wanted[1], b) is not None:
                    return factor * grams_given / grams_wanted
    return None


def _renamed(dimensions: _Dimensions, name: str) -> _Dimensions | None:
    """The dimensions with `name` in the numerator read as a mass; None if it is not there."""
    if dimensions.get(name) != 1:
        return None
    return {"mass" if d == name else d: power for d, power in dimensions.items()}


def _parse(unit: str) -> tuple[Fraction, _Dimensions] | None:
    """Factor to base units, and the power of each dimension."""
    for pattern, spelling in _SPELLINGS:
        unit = pattern.sub(spelling, unit)
    factor = Fraction(1)
    dimensions: Counter[str] = Counter()
    for i, term in enumerate(unit.split("/")):
        sign = 1 if i == 0 else -1
        parsed = _parse_term(term)
        if parsed is None or (not term and i > 0):
            return None
        dimension, size = parsed
        factor *= size**sign
        if dimension:
            dimensions[dimension] += sign
    return factor, {d: power for d, power in dimensions.items() if power}


def _parse_term(term: str) -> tuple[str, Fraction] | None:
    if term in {"", "1"}:
        return "", Fraction(1)
    if term == "%":
        return "", Fraction(1, 100)
    if power := _POWER_OF_TEN.fullmatch(term):
        return "", Fraction(10) ** int(power[1])
    if term in _ATOMS:
        return _ATOMS[term]
    if term[0] in _PREFIXES and term[1:] in _ATOMS:
        dimension, size = _ATOMS[term[1:]]
        return dimension, size * Fraction(10) ** _PREFIXES[term[0]]
    return None
