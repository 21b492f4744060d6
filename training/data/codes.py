"""Event codes of the PhysioNet challenge data: what a LOINC or SNOMED code means, and its unit.

One code is one analyte in one unit, in every data set: where two sources report an analyte in
different units, each unit has its own code.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from llm4ehr.store import CodeInfo

CODES: Mapping[str, CodeInfo] = MappingProxyType(
    {
        "LOINC/6768-6": CodeInfo("alkaline phosphatase in serum or plasma", "U/L"),
        "LOINC/1742-6": CodeInfo("alanine aminotransferase in serum or plasma", "U/L"),
        "LOINC/1920-8": CodeInfo("aspartate aminotransferase in serum or plasma", "U/L"),
        "LOINC/1751-7": CodeInfo("albumin in serum or plasma", "g/dL"),
        "LOINC/3094-0": CodeInfo("urea nitrogen in serum or plasma", "mg/dL"),
        "LOINC/1975-2": CodeInfo("total bilirubin in serum or plasma", "mg/dL"),
        "LOINC/1968-7": CodeInfo("direct bilirubin in serum or plasma", "mg/dL"),
        "LOINC/2093-3": CodeInfo("total cholesterol in serum or plasma", "mg/dL"),
        "LOINC/2160-0": CodeInfo("creatinine in serum or plasma", "mg/dL"),
        "LOINC/1963-8": CodeInfo("bicarbonate in serum or plasma", "mmol/L"),
        "LOINC/1925-7": CodeInfo("base excess in arterial blood", "mmol/L"),
        "LOINC/4544-3": CodeInfo("hematocrit of blood", "%"),
        "LOINC/718-7": CodeInfo("hemoglobin in blood", "g/dL"),
        "LOINC/2823-3": CodeInfo("potassium in serum or plasma", "mmol/L"),
        "LOINC/2951-2": CodeInfo("sodium in serum or plasma", "mmol/L"),
        "LOINC/2075-0": CodeInfo("chloride in serum or plasma", "mmol/L"),
        "LOINC/17861-6": CodeInfo("total calcium in serum or plasma", "mg/dL"),
        "LOINC/1994-3": CodeInfo("ionized calcium in blood", "mmol/L"),
        "LOINC/19123-9": CodeInfo("magnesium in serum or plasma", "mg/dL"),
        "LOINC/2777-1": CodeInfo("phosphate in serum or plasma", "mg/dL"),
        "LOINC/2524-7": CodeInfo("lactate in serum or plasma", "mmol/L"),
        "LOINC/2019-8": CodeInfo("carbon dioxide partial pressure in arterial blood", "mm[Hg]"),
        "LOINC/2703-7": CodeInfo("oxygen partial pressure in arterial blood", "mm[Hg]"),
        "LOINC/19891-1": CodeInfo(
            "carbon dioxide partial pressure in exhaled gas at end of expiration", "mm[Hg]"
        ),
        "LOINC/777-3": CodeInfo("platelets in blood", "10*3/uL"),
        "LOINC/6690-2": CodeInfo("leukocytes in blood", "10*3/uL"),
        "LOINC/14979-9": CodeInfo("activated partial thromboplastin time", "s"),
        "LOINC/3255-7": CodeInfo("fibrinogen in plasma", "mg/dL"),
        "LOINC/10839-9": CodeInfo("cardiac troponin I in serum or plasma", "ug/L"),
        "LOINC/6598-7": CodeInfo("cardiac troponin T in serum or plasma", "ug/L"),
        "LOINC/9187-6": CodeInfo("urine output", "mL"),
        "LOINC/29463-7": CodeInfo("body weight", "kg"),
        "SNOMED/40617009": CodeInfo("mechanical ventilation", None),
    }
)
