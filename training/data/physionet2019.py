"""PhysioNet/Computing in Cardiology Challenge 2019: 40,336 hourly ICU records of two hospitals.

A source is the official layout: folders or tar archives `training_setA` and `training_setB` (either
or both) of pipe-separated files, one row an hour. The row with ICULOS k is the hour bin k - 1; its
values stand in the middle of it, since nothing finer is known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
from numpy.typing import NDArray

from llm4ehr.episode import Episode, Sex, Statics, UnitType
from llm4ehr.store import CodeInfo, EpisodeRecord, StoreInfo
from llm4ehr.variables import VARIABLE_INDEX, VARIABLES
from training.data.codes import CODES
from training.data.extraction import Expected
from training.data.sources import (
    RecordFile,
    RecordSet,
    SourceError,
    Tally,
    chunks,
    parse_group,
    slices_by_stay,
)

SETS: Mapping[str, str] = {"a": "training_setA", "b": "training_setB"}  # split -> folder

_FILES_AT_ONCE = 512

# Column -> variable and priority: pulse oximetry goes before a blood gas.
OBSERVED: Mapping[str, tuple[str, int]] = {
    "HR": ("hr", 0),
    "O2Sat": ("spo2", 0),
    "Temp": ("temp", 0),
    "SBP": ("sbp", 0),
    "MAP": ("mbp", 0),
    "DBP": ("dbp", 0),
    "Resp": ("rr", 0),
    "FiO2": ("fio2", 0),
    "pH": ("ph", 0),
    "SaO2": ("spo2", 1),
    "Glucose": ("glucose", 0),
}
EVENTS: Mapping[str, str] = {
    "EtCO2": "LOINC/19891-1",
    "BaseExcess": "LOINC/1925-7",
    "HCO3": "LOINC/1963-8",
    "PaCO2": "LOINC/2019-8",
    "AST": "LOINC/1920-8",
    "BUN": "LOINC/3094-0",
    "Alkalinephos": "LOINC/6768-6",
    "Calcium": "LOINC/17861-6",
    "Chloride": "LOINC/2075-0",
    "Creatinine": "LOINC/2160-0",
    "Bilirubin_direct": "LOINC/1968-7",
    # Documented as mg/dL, but a median of 1.8 to 2.0 is that of mmol/L (mg/dL would be about 16).
    "Lactate": "LOINC/2524-7",
    # Documented as mmol/dL, but a median of 2.0 is that of mg/dL.
    "Magnesium": "LOINC/19123-9",
    "Phosphate": "LOINC/2777-1",
    "Potassium": "LOINC/2823-3",
    "Bilirubin_total": "LOINC/1975-2",
    "TroponinI": "LOINC/10839-9",
    "Hct": "LOINC/4544-3",
    "Hgb": "LOINC/718-7",
    "PTT": "LOINC/14979-9",
    "WBC": "LOINC/6690-2",
    "Fibrinogen": "LOINC/3255-7",
    "Platelets": "LOINC/777-3",
}
_IONIZED_CALCIUM = "LOINC/1994-3"
ITEMS: tuple[str, ...] = (*OBSERVED, *EVENTS)
COLUMNS: tuple[str, ...] = (
    *("HR", "O2Sat", "Temp", "SBP", "MAP", "DBP", "Resp", "EtCO2", "BaseExcess", "HCO3", "FiO2"),
    *("pH", "PaCO2", "SaO2", "AST", "BUN", "Alkalinephos", "Calcium", "Chloride", "Creatinine"),
    *("Bilirubin_direct", "Glucose", "Lactate", "Magnesium", "Phosphate", "Potassium"),
    *("Bilirubin_total", "TroponinI", "Hct", "Hgb", "PTT", "WBC", "Fibrinogen", "Platelets"),
    *("Age", "Gender", "Unit1", "Unit2", "HospAdmTime", "ICULOS", "SepsisLabel"),
)

# Hospital B files ionized calcium (mmol/L, mostly 1.0 to 1.4) under total calcium (mg/dL, mostly 7
# to 10): below 2.5 only the former is possible. From there to 5.5 it may as well be ionized calcium
# in mg/dL, and nothing tells the two apart.
_CALCIUM_UNCLEAR = (2.5, 5.5)

_SEX: Mapping[float, Sex] = {0.0: "female", 1.0: "male"}
_INDEX = {name: i for i, name in enumerate(ITEMS)}


def _limits(item: str) -> tuple[float, float]:
    if item in OBSERVED:
        variable = VARIABLES[VARIABLE_INDEX[OBSERVED[item][0]]]
        return variable.low, variable.high
    # All events but the base excess are concentrations, which are never zero or less.
    return -np.inf if item == "BaseExcess" else np.nextafter(0.0, 1.0), np.inf


# By position in ITEMS: [2, items] low and high, and what an item becomes.
_LIMITS = np.array([_limits(i) for i in ITEMS]).T
_VARIABLE = np.array([VARIABLE_INDEX[v] for v, _ in OBSERVED.values()], dtype=np.int16)
_PRIORITY = np.array([priority for _, priority in OBSERVED.values()], dtype=np.int8)
_CODE = np.array([EVENTS.get(i) for i in ITEMS], dtype=object)

_INFO = StoreInfo(
    source="physionet2019",
    licence="CC-BY-4.0",
    citation=(
        "Reyna MA, Josef CS, Jeter R, et al. Early Prediction of Sepsis From Clinical Data: The "
        "PhysioNet/Computing in Cardiology Challenge 2019. Critical Care Medicine "
        "2020;48(2):210-217. doi:10.1097/CCM.0000000000004145. Version 1.0.0, "
        "doi:10.13026/v64v-d857. Goldberger AL et al. PhysioBank, PhysioToolkit, and PhysioNet. "
        "Circulation 2000;101(23):e215-e220."
    ),
    created_by="training.data.physionet2019",
    label_notes={
        "mortality": "Not labelled.",
        "length_of_stay": (
            "Not labelled: n_hours is the length of the record, which ends at 336 hours at the "
            "latest and soon after the onset of sepsis."
        ),
        "decompensation": "Not labelled.",
        "phenotyping": "Not labelled. The sepsis label of the source is not taken over.",
    },
)


class PhysioNet2019:
    """The data set at `source`: a folder with sets, or one set. Raises SourceError if none is."""

    info = _INFO
    expected = Expected(absent_variables=frozenset({"gcs_total"}))
    codes: Mapping[str, CodeInfo] = {c: CODES[c] for c in (*EVENTS.values(), _IONIZED_CALCIUM)}

    def __init__(self, source: Path) -> None:
        found = {split: RecordSet.find(source, name, ".psv") for split, name in SETS.items()}
        self._sets = {split: r for split, r in found.items() if r is not None}
        if not self._sets:
            raise SourceError(
                f"{source}: holds neither training_setA nor training_setB (folder or .tar.gz)"
            )
        self.n_episodes = sum(len(r.names) for r in self._sets.values())

    def records(self, tally: Tally) -> Iterator[EpisodeRecord]:
        """Yield every stay in the order of its file name. No stay has labels."""
        for split, record_set in self._sets.items():
            for files in chunks(record_set, _FILES_AT_ONCE):
                for episode in _episodes(files, tally):
                    yield EpisodeRecord(episode=episode, subject_id=episode.episode_id, split=split)


def _episodes(files: Sequence[RecordFile], tally: Tally) -> Iterator[Episode]:
    """The stays of a group of files, cleaned, in the order of the files."""
    table, stay_of_row = parse_group(files, _parse)
    grid = np.column_stack([table[name].to_numpy() for name in ITEMS])  # [rows, items]
    hour = table["ICULOS"].to_numpy()
    row, item = np.nonzero(~np.isnan(grid))
    value, code = _clean(item, grid[row, item], tally)
    kept = ~np.isnan(value)
    row, item, value, code = row[kept], item[kept], value[kept], code[kept]
    stay, hours = stay_of_row[row], hour[row] - 0.5

    is_obs = item < len(OBSERVED)
    observed, events = np.flatnonzero(is_obs), np.flatnonzero(~is_obs)
    of_stay = zip(
        files,
        slices_by_stay(stay_of_row, len(files)),
        slices_by_stay(stay[observed], len(files)),
        slices_by_stay(stay[events], len(files)),
        strict=True,
    )
    descriptors = [table[name].to_numpy() for name in ("Age", "Gender", "Unit1", "Unit2")]
    for file, rows, obs_rows, ev_rows in of_stay:
        obs, ev = observed[obs_rows], events[ev_rows]
        yield Episode(
            episode_id=file.name,
            n_hours=int(hour[rows.stop - 1]),
            obs_variable=_VARIABLE[item[obs]],
            obs_hours=hours[obs],
            obs_value=value[obs],
            obs_priority=_PRIORITY[item[obs]],
            ev_code=code[ev],
            ev_hours=hours[ev],
            ev_value=value[ev],
            statics=_statics(*(column[rows.start] for column in descriptors)),
        )


def _parse(files: Sequence[RecordFile]) -> tuple[pa.Table, NDArray[np.int64]]:
    """The rows of the files and which file each is of. Raises ValueError for a malformed file."""
    bodies = [_body(file.content) for file in files]
    table = pa_csv.read_csv(
        pa.BufferReader(b"".join(bodies)),
        read_options=pa_csv.ReadOptions(column_names=COLUMNS, use_threads=False),
        parse_options=pa_csv.ParseOptions(delimiter="|", ignore_empty_lines=False),
        convert_options=pa_csv.ConvertOptions(
            column_types=dict.fromkeys(COLUMNS, pa.float64()), null_values=["NaN"]
        ),
    )
    stay = np.repeat(np.arange(len(files)), [body.count(b"\n") for body in bodies])
    hour = table["ICULOS"].to_numpy()
    if not ((hour >= 1) & (hour == np.floor(hour))).all():
        raise ValueError("ICULOS is not a whole number of hours from 1 on")
    if (np.diff(hour)[np.diff(stay) == 0] <= 0).any():
        raise ValueError("ICULOS does not rise from row to row")
    return table, stay


def _body(content: bytes) -> bytes:
    """The rows of a record file, each with its line end."""
    header, _, body = content.replace(b"\r\n", b"\n").partition(b"\n")
    if header.decode("ascii", "replace").split("|") != list(COLUMNS):
        raise ValueError(f"the first line does not name the {len(COLUMNS)} columns")
    return body.rstrip(b"\n") + b"\n"


def _clean(
    item: NDArray[np.int64], value: NDArray[np.float64], tally: Tally
) -> tuple[NDArray[np.float64], NDArray[np.object_]]:
    """Value (NaN where refused) and event code (None for an observation) of each item."""
    value, code = value.copy(), _CODE[item]
    percent = (item == _INDEX["FiO2"]) & (value >= 21) & (value <= 100)
    value[percent] /= 100
    if percent.any():
        tally.repaired["percent:FiO2"] += int(percent.sum())

    calcium = item == _INDEX["Calcium"]
    lowest_unclear, lowest_total = _CALCIUM_UNCLEAR
    code[calcium & (value < lowest_unclear)] = _IONIZED_CALCIUM
    unclear = calcium & (value >= lowest_unclear) & (value < lowest_total)
    outside = (value < _LIMITS[0, item]) | (value > _LIMITS[1, item]) | np.isinf(value)
    tally.refuse("unit-unclear", ITEMS, item[unclear])
    tally.refuse("outside-limits", ITEMS, item[outside])
    value[unclear | outside] = np.nan
    return value, code


def _statics(age: float, gender: float, medical: float, surgical: float) -> Statics:
    """Static facts; an age of 100 stands for 90 and above. Half of the stays name no unit."""
    unit: UnitType | None = "medical" if medical == 1 else "surgical" if surgical == 1 else None
    return Statics(
        age_years=None if np.isnan(age) else float(age),
        sex=_SEX.get(gender),
        unit_type=unit,
    )
