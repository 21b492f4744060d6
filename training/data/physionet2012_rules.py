"""PhysioNet 2012: what each parameter becomes, and which of its values are artefacts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llm4ehr.variables import VARIABLE_INDEX, VARIABLES

DESCRIPTORS = ("RecordID", "Age", "Gender", "Height", "ICUType", "Weight")

# Parameter -> variable and priority: an arterial line goes before a cuff, pulse oximetry (which
# other sources have) before a blood gas.
OBSERVED: Mapping[str, tuple[str, int]] = {
    "DiasABP": ("dbp", 0),
    "SysABP": ("sbp", 0),
    "MAP": ("mbp", 0),
    "NIDiasABP": ("dbp", 1),
    "NISysABP": ("sbp", 1),
    "NIMAP": ("mbp", 1),
    "FiO2": ("fio2", 0),
    "HR": ("hr", 0),
    "Temp": ("temp", 0),
    "pH": ("ph", 0),
    "RespRate": ("rr", 0),
    "SaO2": ("spo2", 1),
    "Glucose": ("glucose", 0),
    "GCS": ("gcs_total", 0),
}
EVENTS: Mapping[str, str] = {
    "ALP": "LOINC/6768-6",
    "ALT": "LOINC/1742-6",
    "AST": "LOINC/1920-8",
    "Albumin": "LOINC/1751-7",
    "BUN": "LOINC/3094-0",
    "Bilirubin": "LOINC/1975-2",
    "Cholesterol": "LOINC/2093-3",
    "Creatinine": "LOINC/2160-0",
    "HCO3": "LOINC/1963-8",
    "HCT": "LOINC/4544-3",
    "K": "LOINC/2823-3",
    "Lactate": "LOINC/2524-7",
    # Documented as mmol/L, but the median of 2.0 is that of mg/dL (mmol/L would be about 0.8).
    "Mg": "LOINC/19123-9",
    "Na": "LOINC/2951-2",
    "PaCO2": "LOINC/2019-8",
    "PaO2": "LOINC/2703-7",
    "Platelets": "LOINC/777-3",
    "TroponinI": "LOINC/10839-9",
    "TroponinT": "LOINC/6598-7",
    "WBC": "LOINC/6690-2",
    "Urine": "LOINC/9187-6",
    "Weight": "LOINC/29463-7",  # after 00:00; at 00:00 it is a descriptor
    "MechVent": "SNOMED/40617009",
}

PARAMETERS: tuple[str, ...] = tuple(dict.fromkeys((*DESCRIPTORS, *OBSERVED, *EVENTS)))
INDEX = {name: i for i, name in enumerate(PARAMETERS)}


class Repair(NamedTuple):
    """Values of `parameter` for which `applies` holds are replaced by `repaired` of them."""

    parameter: str
    reason: str
    applies: Callable[[NDArray[np.float64]], NDArray[np.bool_]]
    repaired: Callable[[NDArray[np.float64]], NDArray[np.float64]]


# Artefact rules published by the winner of the challenge's Event 1. The first that applies counts.
REPAIRS: tuple[Repair, ...] = (
    Repair("Height", "below-10", lambda x: x < 10, lambda x: x * 100),
    Repair("Height", "below-25", lambda x: x < 25, lambda x: x * 10),
    Repair("Height", "below-100", lambda x: x < 100, lambda x: x * 2.2),
    Repair("Height", "above-1000", lambda x: x > 1000, lambda x: x * 0.1),
    Repair("Height", "above-250", lambda x: x > 250, lambda x: x * 0.3937),
    Repair("Age", "above-130", lambda x: x > 130, lambda x: np.full_like(x, 91.4)),
    Repair("Temp", "fahrenheit", lambda x: (x >= 95) & (x <= 113), lambda x: (x - 32) / 1.8),
    Repair("pH", "tenth", lambda x: (x >= 0.65) & (x <= 0.8), lambda x: x * 10),
    Repair("pH", "tenfold", lambda x: (x >= 65) & (x <= 80), lambda x: x / 10),
    Repair("pH", "hundredfold", lambda x: (x >= 650) & (x <= 800), lambda x: x / 100),
    Repair("PaCO2", "tenth", lambda x: (x >= 1) & (x < 10), lambda x: x * 10),
    Repair("PaO2", "tenth", lambda x: (x >= 1) & (x < 20), lambda x: x * 10),
)

# What a value may be after repair, both ends included: the same rules' "missing if", and for age
# and height the documented range. Any other event is a concentration, never zero or less.
POSSIBLE: Mapping[str, tuple[float, float]] = {
    "Age": (15, 130),
    "Height": (100, 250),
    "Weight": (35, 299),
    "DiasABP": (1, 200),
    "NIDiasABP": (1, 200),
    "SysABP": (1, np.inf),
    "NISysABP": (1, np.inf),
    "MAP": (1, np.inf),
    "NIMAP": (1, np.inf),
    "HR": (1, 299),
    "RespRate": (1, np.inf),
    "WBC": (1, np.inf),
    "Temp": (25, 45),
    "pH": (6.5, 8),
    "PaCO2": (1, np.inf),
    "PaO2": (1, np.inf),
    "Urine": (0, np.inf),
}
_ANY = (-np.inf, np.inf)
_POSITIVE = (np.nextafter(0.0, 1.0), np.inf)


def _range(parameter: str) -> tuple[float, float]:
    labs = EVENTS.keys() - {"MechVent"}
    return POSSIBLE.get(parameter, _POSITIVE if parameter in labs else _ANY)


def _limits(parameter: str) -> tuple[float, float]:
    if parameter not in OBSERVED:
        return _ANY
    variable = VARIABLES[VARIABLE_INDEX[OBSERVED[parameter][0]]]
    return variable.low, variable.high


# By position in PARAMETERS: [2, parameters] low and high, and what a parameter becomes.
POSSIBLE_RANGE = np.array([_range(p) for p in PARAMETERS]).T
LIMITS = np.array([_limits(p) for p in PARAMETERS]).T
VARIABLE = np.array(
    [VARIABLE_INDEX[OBSERVED[p][0]] if p in OBSERVED else -1 for p in PARAMETERS], dtype=np.int16
)
PRIORITY = np.array([OBSERVED[p][1] if p in OBSERVED else -1 for p in PARAMETERS], dtype=np.int8)
CODE = np.array([EVENTS.get(p) for p in PARAMETERS], dtype=object)
