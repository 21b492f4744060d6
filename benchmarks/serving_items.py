"""What a hospital would send of one hour of a stay: 12 observations and 3 laboratory results."""

from __future__ import annotations

import random
from datetime import datetime, timedelta
from typing import Any

from llm4ehr.variables import VARIABLES, Variable

OBSERVATIONS = 12
_LABS = (("2160-0", 1.1, "mg/dL"), ("2823-3", 4.2, "mmol/L"), ("2524-7", 1.7, "mmol/L"))


def stay_id(bed: int, stay: int = 0) -> str:
    """Name of the so-manyth stay in a bed."""
    return f"stay-{bed}" if stay == 0 else f"stay-{bed}-{stay}"


def hour_body(stay: int, hour: int, admitted: datetime) -> dict[str, Any]:
    """The items of one hour, near the normal values, with ids; the same in every run."""
    rng = random.Random(f"{stay}/{hour}")
    observations = [
        _observation(rng, n, hour, admitted) | {"id": f"{hour}-{n}"} for n in range(OBSERVATIONS)
    ]
    events = [
        {
            "id": f"{hour}-lab-{code}", "code": code, "system": "http://loinc.org",
            "value": round(value * rng.uniform(0.8, 1.2), 2), "unit": unit,
            "time": _time(rng, hour, admitted),
        }
        for code, value, unit in _LABS
    ]  # fmt: skip
    return {"observations": observations, "events": events}


def correction_body(stay: int, hour: int, serial: int, admitted: datetime) -> dict[str, Any]:
    """An observation of that hour again, with another value and an id of its own."""
    rng = random.Random(f"{stay}/{hour}")
    first = _observation(rng, 0, hour, admitted)
    again = {"id": f"{hour}-0-again-{serial}", "corrects": f"{hour}-0"}
    corrected = first | again | {"value": _value(random.Random(serial), VARIABLES[0])}
    return {"observations": [corrected]}


def history_body(stay: int, hours: int, admitted: datetime) -> dict[str, Any]:
    """The items of the first hours in one body."""
    bodies = [hour_body(stay, hour, admitted) for hour in range(hours)]
    return {name: [item for body in bodies for item in body[name]] for name in bodies[0]}


def _observation(rng: random.Random, n: int, hour: int, admitted: datetime) -> dict[str, Any]:
    variable = VARIABLES[n % len(VARIABLES)]
    return {
        "variable": variable.name, "value": _value(rng, variable), "unit": variable.unit,
        "time": _time(rng, hour, admitted),
    }  # fmt: skip


def _value(rng: random.Random, variable: Variable) -> float:
    value = round(variable.normal * rng.uniform(0.97, 1.03), 3)
    return min(max(value, variable.low), variable.high)


def _time(rng: random.Random, hour: int, admitted: datetime) -> str:
    return (admitted + timedelta(hours=hour + rng.uniform(0, 0.99))).isoformat()
