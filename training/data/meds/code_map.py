"""What the codes of a MEDS data set stand for: a YAML file that a site can copy and change.

Every entry is validated before anything is read; `Roles` then tells for each code what becomes of
its rows. Patterns are those of file names: `*` is anything, `?` one character.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Literal, NamedTuple

import polars as pl
import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    ValidationError,
    field_validator,
    model_validator,
)

from llm4ehr.episode import UnitType
from llm4ehr.variables import UnitError, convert, resolve_name
from training.data.codes import CODES
from training.data.sources import SourceError

SHIPPED = ("mimic", "llm4ehr")

Kind = Literal["observation", "gcs", "event", "ignored"]
_VariableName = Literal[
    "dbp", "sbp", "mbp", "fio2", "hr", "temp", "ph", "rr", "spo2", "glucose", "gcs_total"
]
Patterns = tuple[str, ...]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class UnitTypeRule(_Strict):
    """The kind of a unit by its name, which is what follows `//` in the code of an admission."""

    name: str
    unit_type: UnitType


class StayCodes(_Strict):
    """Codes that say when a stay was, whose, and how it ended. None of them becomes an event.

    A record ends at `record_end` where there is one, else at discharge. What `*` stands for in a
    pattern of `icd9` or `icd10` is the code of the diagnosis. `midnight_is_a_day`: of a death at
    00:00 only the day is known.
    """

    admission: Patterns = Field(min_length=1)
    discharge: Patterns = ()
    record_end: Patterns = ()
    hospital_admission: Patterns = ()
    hospital_discharge: Patterns = ()
    died: Patterns = ()
    birth: Patterns = ("MEDS_BIRTH*",)
    death: Patterns = ("MEDS_DEATH*",)
    midnight_is_a_day: bool = True
    female: Patterns = ()
    male: Patterns = ()
    icd9: Patterns = ()
    icd10: Patterns = ()
    unit_types: tuple[UnitTypeRule, ...] = ()
    height_cm: Patterns = ()
    weight_kg: Patterns = ()

    @field_validator("icd9", "icd10")
    @classmethod
    def _one_star(cls, patterns: Patterns) -> Patterns:
        if any(p.count("*") != 1 for p in patterns):
            raise ValueError("a pattern of diagnoses has one *")
        return patterns

    @model_validator(mode="after")
    def _has_an_end(self) -> StayCodes:
        if not (self.discharge or self.record_end):
            raise ValueError("give discharge or record_end")
        return self

    def patterns(self) -> dict[str, Patterns]:
        """All patterns by role. A code can have several roles, such as a discharge and a death."""
        return {
            name: value
            for name in type(self).model_fields
            if name not in ("unit_types", "midnight_is_a_day") and (value := getattr(self, name))
        }


class VariableRule(_Strict):
    """Codes of one of the 11 variables. `unit`: of its values; null: read off them or refused."""

    code: str
    variable: _VariableName
    unit: str | None
    priority: Literal["preferred", "fallback"] = "preferred"

    @model_validator(mode="after")
    def _unit_is_known(self) -> VariableRule:
        variable = resolve_name(self.variable)
        if self.unit is not None:
            try:
                convert(variable, variable.normal, self.unit)
            except UnitError as error:
                raise ValueError(f"{self.variable}: {error}") from error
        elif not variable.unit_optional and all(u.inferred is None for u in variable.units):
            raise ValueError(f"{self.variable}: the unit is never guessed; give it")
        return self


class GcsRule(_Strict):
    """Codes of a component of the coma score, as a number or as charted words."""

    code: str
    component: Literal["eye", "verbal", "motor"]


class EventRule(_Strict):
    """Codes that become the event `event`, which may be one that all data sets share."""

    code: str
    event: str = Field(pattern=r"^[^/\s]+/.+$")
    descriptor: str | None = None
    unit: str | None = None

    @model_validator(mode="after")
    def _has_a_meaning(self) -> EventRule:
        if self.event not in CODES and self.descriptor is None:
            raise ValueError(f"{self.event} is no shared code: give a descriptor")
        return self


class Delay(_Strict):
    """How long after its time a code is known."""

    code: str
    hours: NonNegativeFloat


class CodeMap(_Strict):
    """What the codes of a data set stand for. The first entry that fits a code counts."""

    version: Literal[1]
    name: str
    event_prefix: str
    stays: StayCodes
    variables: tuple[VariableRule, ...] = Field(min_length=1)
    gcs: tuple[GcsRule, ...] = ()
    events: tuple[EventRule, ...] = ()
    ignored: Patterns = ()
    unit_in_code: Patterns = ()
    delays: tuple[Delay, ...] = ()

    @cached_property
    def roles(self) -> Roles:
        """The roles of codes."""
        return Roles(self)


class Role(NamedTuple):
    """What becomes of the rows of a code.

    `name` is the variable, the component of the coma score or the code of the event.
    """

    kind: Kind
    name: str = ""
    unit: str | None = None
    priority: int = 0
    delay: float = 0.0
    descriptor: str | None = None


class Roles:
    """The role of each code, worked out once for each code that occurs."""

    def __init__(self, code_map: CodeMap) -> None:
        self._map = code_map
        self._stay = regex([p for of in code_map.stays.patterns().values() for p in of])
        self._variables = [(regex([r.code]), r) for r in code_map.variables]
        self._gcs = [(regex([r.code]), r) for r in code_map.gcs]
        self._events = [(regex([r.code]), r) for r in code_map.events]
        self._ignored = regex(code_map.ignored)
        self._unit_in_code = regex(code_map.unit_in_code)
        self._delays = [(regex([d.code]), d.hours) for d in code_map.delays]
        self._known: dict[str, Role] = {}

    def __getitem__(self, code: str) -> Role:
        if code not in self._known:
            self._known[code] = self._role(code)
        return self._known[code]

    def _role(self, code: str) -> Role:
        if self._stay.match(code):
            return Role("ignored")
        delay = next((hours for fits, hours in self._delays if fits.match(code)), 0.0)
        for fits, variable in self._variables:
            if fits.match(code):
                priority = int(variable.priority == "fallback")
                return Role("observation", variable.variable, variable.unit, priority, delay)
        for fits, gcs in self._gcs:
            if fits.match(code):
                return Role("gcs", gcs.component, delay=delay)
        for fits, event in self._events:
            if fits.match(code):
                shared = CODES.get(event.event)
                descriptor, unit = shared or (event.descriptor, event.unit)
                return Role("event", event.event, unit, 0, delay, descriptor)
        if self._ignored.match(code):
            return Role("ignored")
        last = code.rpartition("//")[2]
        has_unit = self._unit_in_code.match(code) and last != "UNK"
        unit = last if has_unit else None
        return Role("event", self._map.event_prefix + code, unit, 0, delay)

    @property
    def variables(self) -> frozenset[str]:
        """Variables that have an entry."""
        scores = {"gcs_total"} if self._map.gcs else set()
        return frozenset({r.variable for r in self._map.variables} | scores)


def regex(patterns: Sequence[str]) -> re.Pattern[str]:
    """A regular expression that matches the whole of what one of the patterns fits."""
    # Without patterns: an expression that matches nothing.
    return re.compile("|".join(f"(?:{_one(p)})$" for p in patterns) or r"(?!)", re.DOTALL)


def fits(code: pl.Expr, patterns: Sequence[str]) -> pl.Expr:
    """Whether codes fit one of the patterns."""
    return pl.any_horizontal(
        pl.lit(value=False), *(code.str.contains(f"^(?s:{_one(p)})$") for p in patterns)
    )


def star(code: pl.Expr, patterns: Sequence[str]) -> pl.Expr:
    """What the `*` of the first pattern that fits stands for; null where none fits."""
    return pl.coalesce(
        pl.lit(None, pl.String),
        *(code.str.extract("^(?s:" + _one(p).replace(".*", "(.*)") + ")$", 1) for p in patterns),
    )


def _one(pattern: str) -> str:
    return re.escape(pattern).replace(r"\*", ".*").replace(r"\?", ".")


def load_code_map(path: Path) -> CodeMap:
    """The code map in a YAML file. Raises SourceError that names the file and the key."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}") from error
    return _parse(text, str(path))


def shipped_code_map(name: str) -> CodeMap:
    """One of the code maps `SHIPPED` with this package."""
    file = f"meds_{name}.yaml"
    text = files("training.data.tables").joinpath(file).read_text(encoding="utf-8")
    return _parse(text, file)


def _parse(text: str, where: str) -> CodeMap:
    try:
        return CodeMap.model_validate(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise SourceError(f"{where}: not valid YAML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(str(part) for part in first["loc"])
        raise SourceError(f"{where}: {at}: {first['msg']}") from error
