"""One item of a request, read from raw JSON: what the client said, not yet what it means.

Nothing here depends on the episode or on any table of codes, so an item sent twice reads the same
for ever. No message repeats a value, a code or an id: messages travel into logs.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from service.entries import CONTENT_ID_PREFIX, content_id, to_us
from service.times import TimeError, parse_time
from service.units import canonical_code

_ID = re.compile(r"[\x21-\x7e]{1,128}")
_MAX_TEXT = 256
_COMMON = frozenset({"id", "code", "system", "value", "unit", "time", "available_at", "corrects"})
_OBSERVATION = _COMMON | {"variable"}
_EVENT = _COMMON | {"display"}
_WITHDRAWAL = frozenset({"id", "withdraws"})


class ItemError(Exception):
    """One item cannot be accepted; `type` is part of the API."""

    def __init__(self, type_: str, detail: str) -> None:
        super().__init__(detail)
        self.type = type_
        self.detail = detail


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """An item as the client put it. `content` names it by what it says."""

    kind: Literal["observation", "event", "withdrawal"]
    content: str
    own_id: str | None
    target: str | None
    variable: str | None = None
    code: str | None = None
    """Of an event: in canonical form."""
    system: str | None = None
    display: str | None = None
    value: float | None = None
    unit: str | None = None
    effective_at: datetime | None = None
    available_at: datetime | None = None

    @property
    def item_id(self) -> str:
        return self.own_id or self.content


def read_observation(raw: object, own_id: str | None) -> Said:
    """`own_id` is what `own_id_of` gives. Raises ItemError."""
    item = _object(raw, _OBSERVATION)
    target = _id(item, "corrects")
    variable, code, system = item.get("variable"), item.get("code"), _system(item)
    if (variable is None) == (code is None) or (variable is not None and system is not None):
        raise ItemError("unknown-variable", "either `variable` or `code` is required")
    if code is not None:
        code = _code(item)
    elif not isinstance(variable, str) or len(variable) > _MAX_TEXT:
        raise ItemError("unknown-variable", "none of the variables has this name")
    effective_at, available_at = _times(item)
    value = _number(item.get("value"))
    if value is None:
        raise ItemError("value-missing", "an observation needs a value")
    unit = _unit(item)
    return Said(
        kind="observation",
        content=content_id(
            "observation", variable, system, code, value, unit, *_us(effective_at, available_at),
            target,
        ),
        own_id=_distinct(own_id, target),
        target=target,
        variable=variable,
        code=code,
        system=system,
        value=value,
        unit=unit,
        effective_at=effective_at,
        available_at=available_at,
    )  # fmt: skip


def read_event(raw: object, own_id: str | None) -> Said:
    """`own_id` is what `own_id_of` gives. Raises ItemError."""
    item = _object(raw, _EVENT)
    target = _id(item, "corrects")
    code = canonical_code(_code(item), _system(item))
    display = item.get("display")
    if display is not None and (not isinstance(display, str) or len(display) > _MAX_TEXT):
        raise ItemError("display-invalid", f"a text of at most {_MAX_TEXT} characters is required")
    effective_at, available_at = _times(item)
    value, unit = _number(item.get("value")), _unit(item)
    return Said(
        kind="event",
        content=content_id(
            "event", code, value, unit, *_us(effective_at, available_at), target
        ),
        own_id=_distinct(own_id, target),
        target=target,
        code=code,
        display=display,
        value=value,
        unit=unit,
        effective_at=effective_at,
        available_at=available_at,
    )  # fmt: skip


def read_withdrawal(raw: object, own_id: str | None) -> Said:
    """`own_id` is what `own_id_of` gives. Raises ItemError."""
    item = _object(raw, _WITHDRAWAL)
    target = _id(item, "withdraws")
    if target is None:
        raise ItemError("id-invalid", "a withdrawal names the item it withdraws")
    return Said(
        kind="withdrawal",
        content=content_id("withdrawal", target),
        own_id=_distinct(own_id, target),
        target=target,
    )


def own_id_of(raw: object) -> str | None:
    """The id a client gave an item. Raises ItemError if it is not a usable one."""
    own_id = _id(raw, "id") if isinstance(raw, dict) else None
    if own_id is not None and own_id.startswith(CONTENT_ID_PREFIX):
        raise ItemError("id-invalid", f"ids that begin with {CONTENT_ID_PREFIX} are ours to give")
    return own_id


def _object(raw: object, allowed: frozenset[str]) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise ItemError("item-not-an-object", "an item is a JSON object")
    if not raw.keys() <= allowed:
        raise ItemError("unknown-field", f"allowed fields: {', '.join(sorted(allowed))}")
    return raw


def _id(item: dict[str, Any], name: str) -> str | None:
    value = item.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or _ID.fullmatch(value) is None:
        raise ItemError("id-invalid", f"`{name}` is 1 to 128 printable ASCII characters, no space")
    return value


def _distinct(own_id: str | None, target: str | None) -> str | None:
    if own_id is not None and own_id == target:
        raise ItemError("id-invalid", "an item cannot correct or withdraw itself")
    return own_id


def _code(item: dict[str, Any]) -> str:
    code = item.get("code")
    if not isinstance(code, str) or _ID.fullmatch(code) is None:
        raise ItemError("code-unknown", "a code is 1 to 128 printable ASCII characters, no space")
    return code


def _system(item: dict[str, Any]) -> str | None:
    system = item.get("system")
    if system is not None and (not isinstance(system, str) or _ID.fullmatch(system) is None):
        raise ItemError("code-unknown", "a code system is a URI or a short name")
    return system


def _unit(item: dict[str, Any]) -> str | None:
    unit = item.get("unit")
    if unit is not None and (not isinstance(unit, str) or len(unit) > _MAX_TEXT):
        raise ItemError("unit-unknown", "a unit is a short text, best in UCUM")
    return unit


def _number(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ItemError("value-not-a-number", "a value is a JSON number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ItemError("value-not-finite", "a value is a finite number")
    return number


def _times(item: dict[str, Any]) -> tuple[datetime, datetime | None]:
    if item.get("time") is None:
        raise ItemError("time-missing", "an item needs the time when it was true")
    try:
        effective_at = parse_time(item["time"])
        available = item.get("available_at")
        return effective_at, None if available is None else parse_time(available)
    except TimeError as error:
        raise ItemError(error.reason, str(error)) from error


def _us(effective_at: datetime, available_at: datetime | None) -> tuple[int, int | None]:
    return to_us(effective_at), None if available_at is None else to_us(available_at)
