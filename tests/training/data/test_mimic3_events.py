"""The MIMIC-III reader: the laboratory, infusions and procedures, on a tiny synthetic set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.training.data.mimic3_source import (
    chart,
    extract,
    lab,
    order,
    write,
)
from training.data.mimic.mimic3 import Mimic3
from training.data.sources import SourceError

Source = Callable[..., Path]


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """`source(TABLE=[rows], ...)`: a folder in the official format; one stay unless told."""
    return lambda **tables: write(tmp_path, **tables)


# --- the laboratory -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "gas", "other"),
    [
        ({}, 0.5, 2),
        ({"lab_delay": 4.0}, 4, 4),
        ({"lab_delay": 0.0}, None, None),
        ({"profile": "benchmark"}, None, None),
        ({"profile": "benchmark", "lab_delay": 1.0}, None, 1),
    ],
)
def test_results_come_after_a_delay(
    source: Source, options: dict[str, Any], gas: float | None, other: float | None
) -> None:
    rows = [lab(50800, "ART"), lab(50820, 7.3), lab(50912, 1.1)]
    made = extract(source(LABEVENTS=rows), **options)
    assert made.values("ph") == [(1, gas and 1 + gas, 7.3, 0)]
    assert made.events("LOINC/2160-0") == [(1, other and 1 + other, 1.1)]


def test_impossible_options_are_refused(source: Source) -> None:
    with pytest.raises(SourceError, match="no profile 'paper'"):
        Mimic3(source(), profile="paper")  # type: ignore[arg-type]
    for delay in (-1.0, float("nan")):
        with pytest.raises(SourceError, match="lab_delay"):
            Mimic3(source(), lab_delay=delay)


def test_missing_table_is_named(source: Source) -> None:
    folder = source()
    (folder / "LABEVENTS.csv").unlink()
    with pytest.raises(SourceError, match=r"LABEVENTS\.csv"):
        Mimic3(folder)


def test_blood_is_arterial_only_where_the_laboratory_says_so(source: Source) -> None:
    rows = [
        *(lab(50800, kind, hour) for hour, kind in ((1, "ART"), (2, "MIX"))),
        *(lab(item, value, h) for h in (1, 2, 3) for item, value in
          ((50820, 7.3), (50817, 95), (50821, 80))),
    ]  # fmt: skip
    made = extract(source(LABEVENTS=rows))
    assert made.values("ph") == [(1, 1.5, 7.3, 0), (2, 2.5, 7.3, 1), (3, 3.5, 7.3, 1)]
    assert made.values("spo2") == [(1, 1.5, 95, 1)]
    assert made.events("MIMIC/LAB/50817") == [(2, 2.5, 95), (3, 3.5, 95)]
    assert made.events("LOINC/2703-7") == [(1, 1.5, 80)]
    assert made.events("MIMIC/LAB/50821") == [(2, 2.5, 80), (3, 3.5, 80)]


def test_chart_copies_of_results_are_dropped(source: Source) -> None:
    labs = [lab(50931, 118, 4), lab(50931, 140, 10)]
    charts = [
        chart(811, "118", 4),
        chart(1529, "118", 5.5),  # 90 minutes later
        chart(811, "118", 5.6),
        chart(811, "119", 4.1),
        chart(807, "118", 4.2),  # a fingerstick is a measurement of its own
        chart(220621, "140", 9),
    ]
    made = extract(source(LABEVENTS=labs, CHARTEVENTS=charts))
    assert [(h, v, p) for h, _, v, p in made.values("glucose")] == [
        (4, 118, 0), (4.1, 119, 0), (4.2, 118, 1), (5.6, 118, 0), (10, 140, 0)
    ]  # fmt: skip
    assert made.tally.refused == {"copy-of-lab:glucose": 3}


def test_a_copy_of_a_result_that_is_no_observation_stays(source: Source) -> None:
    labs = [
        lab(50931, 118) | {"charttime": "2149-12-31 23:30:00"},  # before admission
        lab(50931, 140, 47.5),  # known after the end
    ]
    charts = [chart(811, "118", 0.5), chart(811, "140", 47.75)]
    made = extract(source(LABEVENTS=labs, CHARTEVENTS=charts))
    assert [(h, v) for h, _, v, _ in made.values("glucose")] == [(0.5, 118), (47.75, 140)]
    assert made.tally.refused == {"before-admission:observation": 1, "after-end:observation": 1}


def test_results_are_numbers_in_the_unit_of_their_code(source: Source) -> None:
    rows = [
        lab(50912, "<0.2", 1, valueuom="mg/dL"),
        lab(50912, "GREATER THAN 20", 2, valueuom="MG/DL"),
        lab(50912, "1.5", 3),
        lab(50912, "88", 4, valueuom="umol/L"),
        lab(50889, "5", 1, valueuom="mg/L"),
        lab(50889, "2", 2, valueuom="mg/dL"),
        lab(50912, "HEMOLYZED", 5),
        lab(51491, "5.5", 1, valueuom="units"),
        lab(59999, "7", 1, valueuom="blobs"),
    ]
    made = extract(source(LABEVENTS=rows), lab_delay=0.0)
    assert made.events("LOINC/2160-0") == [(1, None, 0.2), (2, None, 20), (3, None, 1.5)]
    assert made.events("LOINC/2160-0//umol/L") == [(4, None, 88)]
    assert made.events("MIMIC/LAB/50889") == [(1, None, 5), (2, None, 20)]
    assert made.tally.refused == {"text-result:lab": 1}
    assert made.items.codes.rows() == [
        ("LOINC/2160-0", "creatinine in serum or plasma", "mg/dL"),
        ("LOINC/2160-0//umol/L", "creatinine in serum or plasma", "umol/L"),
        ("MIMIC/LAB/50889", "c-reactive protein in blood", "mg/L"),
        ("MIMIC/LAB/51491", "ph in urine", "1"),
        ("MIMIC/LAB/59999//{blobs}", "item 59999", "{blobs}"),
    ]


# --- infusions and procedures ---------------------------------------------------------------------


def test_infusion_starts_changes_and_ends(source: Source) -> None:
    rate = {"itemid": 221906, "rateuom": "mcg/kg/min", "linkorderid": 7}
    rows = [
        order(start=1, end=2, rate=0.1, statusdescription="Changed", **rate),
        order(start=2, end=5, rate=0.2, statusdescription="Stopped", **rate),
        order(start=6, end=7, rate=9, statusdescription="Rewritten", **rate),
        order(start=8, end=9, rate=9, **rate) | {"cancelreason": 1},
        order(start=9, end=8, rate=9, **rate),
        order(start=8, end=9, amount=-1, **rate),
        order(221347, 3, 3 + 1 / 60, amount=150, linkorderid=8),
        order(221347, 4, 6, rate=60, rateuom="mg/hour", linkorderid=9),
    ]
    made = extract(source(INPUTEVENTS_MV=rows, CHARTEVENTS=[chart(211, 80)]))
    assert made.events("MIMIC/INPUT_START/221906") == [(1, None, 0.1), (2, None, 0.2)]
    assert made.events("MIMIC/INPUT_END/221906") == [(5, None, None)]
    # A dose has no rate and no end. The usual unit of amiodarone is mg/min.
    assert made.events("MIMIC/INPUT_START/221347") == [(3, None, None), (4, None, 1)]
    assert made.events("MIMIC/INPUT_END/221347") == [(6, None, None)]
    assert made.tally.refused == {
        f"{reason}:INPUTEVENTS_MV": 1
        for reason in ("rewritten", "cancelled", "end-before-start", "negative-amount")
    }
    assert made.items.codes.rows() == [
        ("MIMIC/INPUT_END/221347", "amiodarone ended", None),
        ("MIMIC/INPUT_END/221906", "norepinephrine ended", None),
        ("MIMIC/INPUT_START/221347", "amiodarone started", "mg/min"),
        ("MIMIC/INPUT_START/221906", "norepinephrine started", "ug/kg/min"),
    ]


def test_an_end_that_cannot_be_read_is_counted(source: Source) -> None:
    rows = [order(221906, 1, 2, rate=0.1) | {"endtime": "2150-01-01 02:00"}]
    made = extract(source(INPUTEVENTS_MV=rows))
    assert made.events("MIMIC/INPUT_START/221906") == [(1, None, 0.1)]
    assert made.events("MIMIC/INPUT_END/221906") == []
    assert made.tally.refused == {"unreadable-time:INPUTEVENTS_MV": 1}


def test_procedure_starts_and_ends(source: Source) -> None:
    rows = [order(225792, 1, 60, value=3540), order(225792, 3, 5, statusdescription="Rewritten")]
    made = extract(source(PROCEDUREEVENTS_MV=rows))
    assert made.events("MIMIC/PROCEDURE_START/225792") == [(1, None, None)]
    assert made.events("MIMIC/PROCEDURE_END/225792") == []  # after the stay of 48 hours
    assert made.tally.refused == {"rewritten:PROCEDUREEVENTS_MV": 1, "after-end:event": 1}
