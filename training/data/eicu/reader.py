"""eICU Collaborative Research Database 2.0: 200,859 unit stays in 208 hospitals of the USA.

A source is a folder with the official tables, as .csv or .csv.gz. Only `patient` and one table with
vital signs are needed; what else is absent is reported, for a hospital may lack a table as well.
All times of eICU are minutes since unit admission.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import polars as pl

from llm4ehr.store import StoreInfo
from training.data.eicu import benchmark, events, observations
from training.data.eicu.cohort import described, strict_stays, with_age
from training.data.eicu.files import BEDSIDE, KEY, OPTIONAL, VARIABLE_TABLES, find
from training.data.extraction import Cohort, Expected, Items, Scan
from training.data.sources import SourceError, Tally, licence_of

Profile = Literal["strict", "benchmark"]

_MORTALITY = (
    "Death in hospital: hospitaldischargestatus. {}Null where the status of the hospital discharge "
    "is not known."
)
_DECOMPENSATION = (
    "Death in hospital, in the unit or after it. eICU has no time of death: it is the unit "
    "discharge of a stay that ended with death, else the hospital discharge. The benchmark counts "
    "deaths in the unit alone."
)
_REMAINING = "Unit stay: unitdischargeoffset."
_CITATION = (
    "Pollard TJ, Johnson AEW, Raffa JD, Celi LA, Mark RG, Badawi O. The eICU Collaborative "
    "Research Database, a freely available multi-center database for critical care research. "
    "Scientific Data 2018;5:180178. doi:10.1038/sdata.2018.178. Version 2.0, "
    "doi:10.13026/C2WM1R. Goldberger AL et al. PhysioBank, PhysioToolkit, and PhysioNet. "
    "Circulation 2000;101(23):e215-e220."
)
_LABELS: Mapping[Profile, Mapping[str, str]] = {
    "strict": {
        "mortality": _MORTALITY.format("A death in the unit counts if that is not known. ")
        + " Null if the two contradict each other.",
        "decompensation": _DECOMPENSATION,
        "remaining_los": _REMAINING,
        "phenotyping": "The first ICD-9 code of every diagnosis, ICD-10 where there is no other. "
        "Null for a stay without a code.",
    },
    "benchmark": {
        "mortality": _MORTALITY.format(""),
        "decompensation": _DECOMPENSATION,
        "remaining_los": _REMAINING,
        "phenotyping": "The first code of diagnoses entered after admission, if it is an ICD-9 "
        "code. Null for a stay with none of the 25.",
    },
}


class EICU:
    """The data set at `source`.

    `profile` 'strict' is for use, 'benchmark' for comparison with Sheikhalishahi et al. (2020).
    Raises SourceError if `source` lacks `patient` or every table with vital signs, and for the
    benchmark also if it lacks nurse charting or laboratory results.
    """

    def __init__(self, source: Path, *, profile: Profile = "strict") -> None:
        if profile not in _LABELS:
            raise SourceError(f"eicu has no profile {profile!r}; known: strict, benchmark")
        self.limits = profile == "strict"
        patient = find(source, "patient")
        if patient is None:
            raise SourceError(f"{source}: no patient.csv or patient.csv.gz")
        self._patient = patient
        found = {name: find(source, name) for name in OPTIONAL}
        self._tables = {name: table for name, table in found.items() if table is not None}
        self._benchmark = profile == "benchmark"
        if self._benchmark:
            for name in ("nurseCharting", "lab"):
                if name not in self._tables:
                    raise SourceError(f"{source}: no {name}, which the benchmark is made of")
        elif not any(name in self._tables for name in BEDSIDE):
            raise SourceError(f"{source}: none of {', '.join(BEDSIDE)}: no vital signs")
        tasks = {"mortality", "decompensation", "remaining_los"}
        if "diagnosis" in self._tables:
            tasks.add("phenotyping")
        self.expected = Expected(
            absent_variables=frozenset(
                variable
                for variable, tables in VARIABLE_TABLES.items()
                if not any(name in self._tables for name in tables)
            ),
            tasks=frozenset(tasks),
            published={} if self.limits else {"stays": benchmark.PUBLISHED_STAYS},
        )
        self.info = StoreInfo(
            source="eicu",
            licence=licence_of(source),
            citation=_CITATION,
            created_by="training.data.eicu.reader",
            label_notes={task: note for task, note in _LABELS[profile].items() if task in tasks},
            options={"profile": profile},
        )

    def cohort(self, tally: Tally) -> Cohort:
        """The stays. The benchmark profile passes over nurse charting and lab for this.

        Both profiles pass over medication here, for the names of ingredients.
        """
        for name in OPTIONAL:
            if name not in self._tables:
                tally.refused[f"table-absent:{name}"] += 1
        patients = with_age(self._patient.read())
        if self._benchmark:
            stays, steps = benchmark.benchmark_stays(
                patients, self._tables["nurseCharting"], self._tables["lab"]
            )
        else:
            stays, steps = strict_stays(patients)
        diagnosis = self._tables.get("diagnosis")
        diagnoses = None if diagnosis is None else diagnosis.read()
        _ = self._ingredients  # now, for the bars of the scans leave no room for another
        return described(stays, steps, diagnoses, tally, benchmark=self._benchmark)

    def scans(self, cohort: Cohort) -> Sequence[Scan]:
        """The tables of observations and events that there are."""
        stays = cohort.stays.select(
            pl.col("_id").alias(KEY), stay=pl.int_range(pl.len(), dtype=pl.Int32)
        )
        selects: dict[str, Callable[..., pl.DataFrame]] = {
            "nurseCharting": partial(observations.select_charting, benchmark=self._benchmark),
            "vitalPeriodic": observations.select_monitor,
            "vitalAperiodic": observations.select_monitor,
            "lab": events.select_labs,
            "respiratoryCharting": observations.select_oxygen,
            "physicalExam": observations.select_exam,
            "infusionDrug": events.select_infusions,
            "treatment": events.select_treatments,
        }
        if self._benchmark:
            for name in ("vitalPeriodic", "vitalAperiodic", "respiratoryCharting", "physicalExam"):
                del selects[name]
        if self._ingredients is not None:
            selects["medication"] = partial(events.select_orders, names=self._ingredients)
        return [
            Scan(name, self._tables[name], partial(_select, select, stays))
            for name, select in selects.items()
            if name in self._tables
        ]

    @cached_property
    def _ingredients(self) -> pl.DataFrame | None:
        medication = self._tables.get("medication")
        return None if medication is None else events.ingredient_names(medication)

    def assemble(
        self, stays: pl.DataFrame, items: Mapping[str, pl.DataFrame], tally: Tally
    ) -> Items:
        """Observations and events of a block of stays."""
        make = benchmark.observations if self._benchmark else observations.observations
        return Items(make(items, tally), *events.events(items, tally))


def _select(
    select: Callable[..., pl.DataFrame], stays: pl.DataFrame, rows: pl.DataFrame, tally: Tally
) -> pl.DataFrame:
    return select(rows, stays, tally=tally)
