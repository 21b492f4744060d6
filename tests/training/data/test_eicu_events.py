"""The eICU reader: events, on a tiny synthetic set."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.training.data.eicu_source import at, drawn, extract, one_stay, order, write
from training.data.codes import CODES
from training.data.eicu.drugs import drug_name
from training.data.eicu.events import lab_codes
from training.data.eicu.files import COLUMNS


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return one_stay(tmp_path)


# ------------------------------------------------------------------------------------------- events


def test_laboratory_events(source: Path) -> None:
    usual = {"labmeasurenamesystem": "mg/dL"}
    write(
        source,
        "lab",
        [
            drawn(60, "creatinine", 1.2, labresultrevisedoffset=99, **usual),
            drawn(70, "creatinine", 88, labmeasurenamesystem="umol/L"),
            drawn(60, "ionized calcium", 4.8, "1.20", labmeasurenameinterface="mmol/L", **usual),
            drawn(61, "ionized calcium", 1.17, labmeasurenameinterface="MMOL/L", **usual),
            drawn(60, "magnesium", 1.4, "1.40", labmeasurenameinterface="meq/L", **usual),
            drawn(60, "CRP", 1148, "114.8", labmeasurenameinterface="mg/L", **usual),
            drawn(60, "troponin - I", "", "<0.02", labmeasurenamesystem="ng/mL"),
            drawn(60, "Temperature", 98.6, labmeasurenamesystem="&#176;C"),
            drawn(60, "Device", "", "nasal cannula"),
            drawn(60, "a new assay", 5, labmeasurenamesystem="mg/L"),
            # Revised: the last version stands, from when it was known.
            drawn(80, "Hgb", 8.3, labresultrevisedoffset=90),
            drawn(80, "Hgb", 8.0, labresultrevisedoffset=130),
        ],
    )
    found = extract(source)
    assert found.happened("LOINC/2160-0") == [(60, 99, 1.2)]
    assert found.happened("LOINC/2160-0//umol/L") == [(70, None, 88)]
    assert found.happened("LOINC/1994-3") == [(60, None, 1.197665), (61, None, 1.17)]
    assert found.happened("LOINC/19123-9") == [(60, None, 1.70142)]
    assert found.happened("EICU/LAB/CRP") == [(60, None, 11.48)]
    assert found.happened("LOINC/10839-9") == [(60, None, 0.02)]
    assert found.happened("EICU/LAB/Temperature") == [(60, None, 37)]
    assert found.happened("EICU/LAB/a_new_assay//mg/L") == [(60, None, 5)]
    assert found.happened("LOINC/718-7") == [(80, 130, 8.0)]
    assert found.tally.refused["result-in-words:lab"] == 1
    codes = {code: (words, unit) for code, words, unit in found.items.codes.iter_rows()}
    assert codes["LOINC/2160-0"] == CODES["LOINC/2160-0"]
    assert codes["LOINC/2160-0//umol/L"] == (CODES["LOINC/2160-0"].descriptor, None)
    assert codes["EICU/LAB/CRP"] == ("c reactive protein", "mg/dL")
    assert codes["EICU/LAB/a_new_assay//mg/L"] == ("a new assay", None)


def test_orders(source: Path) -> None:
    write(
        source,
        "medication",
        [
            order(60, "2 ML VIAL : ONDANSETRON HCL 4 MG/2ML IJ SOLN", 300, drugorderoffset=75),
            order(70, "ondansetron (ZOFRAN) injection 4 mg", 0),
            order(80, "Ondansetron", 70),
            order(90, "ONDANSETRON", 500, drugordercancelled="Yes"),
            order(95, "", 120, drughiclseqno=33598),
            order(96, "Zofran", drughiclseqno=33598, drugordercancelled="Yes"),
            order(97, "Zofran 4 mg", drughiclseqno=33598, drugordercancelled="Yes"),
            order(98, "Ondansetron inj", drughiclseqno=33598, drugordercancelled="Yes"),
            order(99, "", drughiclseqno=1),
            order(99, ""),
        ],
    )
    found = extract(source)
    assert found.happened("EICU/ORDER/ondansetron") == [
        (60, 75, None),
        (70, None, None),
        (80, None, None),
    ]
    assert found.happened("EICU/ORDER_END/ondansetron") == [(300, None, None)]
    # Without a name, an order is called as most orders of its ingredient are.
    assert found.happened("EICU/ORDER/zofran") == [(95, None, None)]
    assert found.happened("EICU/ORDER/hicl_1") == [(99, None, None)]
    assert found.tally.refused["cancelled:medication"] == 4
    assert found.tally.refused["no-name:medication"] == 1
    assert found.tally.repaired["no-stop:medication"] == 3
    codes = dict(found.items.codes.select("code", "descriptor").iter_rows())
    assert codes["EICU/ORDER_END/ondansetron"] == "end of the order of ondansetron"


def test_infusions(source: Path) -> None:
    write(
        source,
        "infusionDrug",
        [
            at("infusionoffset", 60, drugname="Norepinephrine (mcg/min)", drugrate="8"),
            at("infusionoffset", 60, drugname="Norepinephrine (ml/hr)", drugrate="15"),
            at("infusionoffset", 90, drugname="Norepinephrine (mcg/min)", drugrate="OFF"),
            at("infusionoffset", 95, drugname="Norepinephrine ()", drugrate="8"),
            at("infusionoffset", 60, drugname="Insulin 100 units in NS (units/hr)", drugrate="2"),
            at("infusionoffset", 60, drugname="", drugrate="2"),
        ],
    )
    found = extract(source)
    assert found.happened("EICU/INFUSION/norepinephrine//mcg/min") == [
        (60, None, 8),
        (90, None, None),
    ]
    assert found.happened("EICU/INFUSION/norepinephrine//ml/hr") == [(60, None, 15)]
    # A rate without a unit is not a number.
    assert found.happened("EICU/INFUSION/norepinephrine") == [(95, None, None)]
    units = dict(found.items.codes.select("code", "unit").iter_rows())
    assert units == {
        "EICU/INFUSION/norepinephrine": None,
        "EICU/INFUSION/norepinephrine//mcg/min": "ug/min",
        "EICU/INFUSION/norepinephrine//ml/hr": "mL/h",
        "EICU/INFUSION/insulin//units/hr": "[iU]/h",
    }
    assert found.tally.repaired["no-unit:infusionDrug"] == 1
    assert found.tally.repaired["no-rate:infusionDrug"] == 1


def treatment_table(folder: Path, active: str) -> None:
    (folder / "treatment.csv").write_text(
        "treatmentid,patientunitstayid,treatmentoffset,treatmentstring,activeupondischarge\n"
        f"1,1,60,pulmonary|ventilation and oxygenation|mechanical ventilation,{active}\n"
    )


def test_nothing_depends_on_what_is_active_upon_discharge(source: Path) -> None:
    found = []
    for active in ("True", "False"):
        treatment_table(source, active)
        found.append(extract(source).items)
    assert found[0].events.equals(found[1].events)
    assert found[0].events["code"].to_list() == ["EICU/TREATMENT/mechanical_ventilation"]
    assert found[0].codes.row(0) == (
        "EICU/TREATMENT/mechanical_ventilation",
        "mechanical ventilation",
        None,
    )
    assert not any("activeupondischarge" in columns for columns in COLUMNS.values())


def test_diagnoses_are_no_events(source: Path) -> None:
    write(source, "diagnosis", [at("diagnosisoffset", 60, icd9code="038.9, A41.9")])
    assert extract(source).items.events.is_empty()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("2 ML VIAL : ONDANSETRON HCL 4 MG/2ML IJ SOLN", "ondansetron"),
        ("1 ML  -  HYDROMORPHONE HCL 1 MG/ML IJ SOLN", "hydromorphone"),
        ("MORPHINE 5 MG/ML INJECTION : 1 ML VIAL", "morphine"),
        ("SODIUM CHLORIDE 0.9% 1,000 ML BAG", "sodium chloride"),
        ("3% Sodium Chloride", "sodium chloride"),
        ("potassium CHLORIDE 10 mEq i", "potassium chloride"),
        ("furosemide (LASIX) tablet 40 mg", "furosemide"),
        ("PIPERACILLIN/TAZOBACTAM SOD 3.375 GM  VIAL", "piperacillin/tazobactam sod"),
        ("ipratropium-albuterol", "ipratropium-albuterol"),
        ("NOREPINEPHRINE 8 MG in 250mL NS", "norepinephrine"),
        ("Volume (mL) Magnesium ", "magnesium"),
        ("1/2NS", "1/2ns"),
        ("IV", "iv"),  # nothing would be left
        ("0.9 %", "0.9 %"),
    ],
)
def test_drug_names(text: str, name: str) -> None:
    assert pl.select(drug_name(pl.lit(text))).item() == name


@given(st.text(st.characters(min_codepoint=32, max_codepoint=382), max_size=30).filter(str.strip))
def test_a_drug_always_has_a_name(text: str) -> None:
    name = pl.select(drug_name(pl.lit(text))).item()
    assert name
    assert name == name.lower().strip()


def test_every_laboratory_has_a_code_of_its_own() -> None:
    codes = lab_codes()
    assert codes["code"].is_unique().all()
    assert codes["labname"].is_unique().all()
    assert codes["descriptor"].null_count() == 0
    assert (codes["descriptor"] != "").all()
