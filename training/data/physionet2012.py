"""PhysioNet/Computing in Cardiology Challenge 2012: 12,000 adult ICU stays, their first 48 hours.

A source is the official layout: folders or tar archives `set-a`, `set-b`, `set-c` (any of them)
with `Outcomes-a.txt` and so on beside them. A set without its outcomes gets no labels.

Artefacts are repaired and impossible values dropped (both in `physionet2012_rules`), then values
beyond the limits of the variable; of several values of one parameter at one time the last is kept.
Each step counts what it leaves out or mends.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
from numpy.typing import NDArray

from llm4ehr.episode import Episode, Sex, Statics, UnitType
from llm4ehr.store import CodeInfo, EpisodeRecord, Outcome, StoreInfo
from training.data.codes import CODES
from training.data.extraction import Expected
from training.data.physionet2012_rules import (
    CODE,
    DESCRIPTORS,
    EVENTS,
    INDEX,
    LIMITS,
    OBSERVED,
    PARAMETERS,
    POSSIBLE_RANGE,
    PRIORITY,
    REPAIRS,
    VARIABLE,
)
from training.data.sources import (
    RecordFile,
    RecordSet,
    SourceError,
    Tally,
    chunks,
    parse_group,
    slices_by_stay,
)

RECORD_HOURS = 48
SETS = ("a", "b", "c")

_FILES_AT_ONCE = 512
_HEADER = b"Time,Parameter,Value\n"
_MISSING = -1.0  # in descriptors

_SEX: Mapping[float, Sex] = {0.0: "female", 1.0: "male"}
_UNIT_TYPE: Mapping[float, UnitType] = {
    1.0: "coronary",
    2.0: "cardiac_surgery",
    3.0: "medical",
    4.0: "surgical",
}

_INFO = StoreInfo(
    source="physionet2012",
    licence="ODC-By-1.0",
    citation=(
        "Silva I, Moody G, Scott DJ, Celi LA, Mark RG. Predicting In-Hospital Mortality of ICU "
        "Patients: The PhysioNet/Computing in Cardiology Challenge 2012. Computing in Cardiology "
        "2012;39:245-248. Version 1.0.0. Goldberger AL et al. PhysioBank, PhysioToolkit, and "
        "PhysioNet. Circulation 2000;101(23):e215-e220."
    ),
    created_by="training.data.physionet2012",
    label_notes={
        "mortality": "In-hospital_death of the outcomes file; null in a set without that file.",
        "length_of_stay": (
            "los_hours is 24 x Length_of_stay, the days from ICU admission to the end of the "
            "HOSPITAL stay, known to the day only. Null where it is not recorded (-1) and where "
            "it is shorter than the 48 hours of the record."
        ),
        "decompensation": (
            "The time of an in-hospital death is known to the day only: with Survival = D days it "
            "lies in [max(48, 24 D), max(48, 24 D) + 24) hours, since every patient lived through "
            "the 48 hours of the record. Deaths after discharge give no interval."
        ),
        "phenotyping": "Not labelled.",
    },
)

LABELLED_TASKS = frozenset({"mortality", "decompensation", "remaining_los"})


class PhysioNet2012:
    """The data set at `source`: a folder with sets, or one set. Raises SourceError if none is."""

    info = _INFO
    codes: Mapping[str, CodeInfo] = {code: CODES[code] for code in EVENTS.values()}

    def __init__(self, source: Path) -> None:
        found = {s: RecordSet.find(source, f"set-{s}", ".txt") for s in SETS}
        self._sets = {s: r for s, r in found.items() if r is not None}
        if not self._sets:
            raise SourceError(f"{source}: holds none of set-a, set-b, set-c (folder or .tar.gz)")
        self.n_episodes = sum(len(r.names) for r in self._sets.values())
        labelled = any(self._outcomes_file(split).exists() for split in self._sets)
        self.expected = Expected(tasks=LABELLED_TASKS if labelled else frozenset())

    def _outcomes_file(self, split: str) -> Path:
        return self._sets[split].path.parent / f"Outcomes-{split}.txt"

    def records(self, tally: Tally) -> Iterator[EpisodeRecord]:
        """Yield every stay in the order of its RecordID."""
        for split, record_set in self._sets.items():
            outcomes = _read_outcomes(self._outcomes_file(split), tally)
            for files in chunks(record_set, _FILES_AT_ONCE):
                for episode in _episodes(files, tally):
                    name = episode.episode_id
                    if outcomes is not None and name not in outcomes:
                        raise SourceError(f"Outcomes-{split}.txt: no row for record {name}")
                    yield EpisodeRecord(
                        episode=episode,
                        subject_id=name,
                        split=split,
                        outcome=outcomes[name] if outcomes is not None else Outcome(),
                    )


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """Rows of a group of files: which file, which of `PARAMETERS`, minutes, value."""

    stay: NDArray[np.int64]
    parameter: NDArray[np.int64]
    minute: NDArray[np.int64]
    value: NDArray[np.float64]

    def where(self, keep: NDArray[np.bool_] | NDArray[np.int64]) -> _Rows:
        return _Rows(self.stay[keep], self.parameter[keep], self.minute[keep], self.value[keep])

    def of(self, *parameters: str) -> NDArray[np.bool_]:
        return np.isin(self.parameter, [INDEX[p] for p in parameters])


def _episodes(files: Sequence[RecordFile], tally: Tally) -> Iterator[Episode]:
    """The stays of a group of files, cleaned, in the order of the files."""
    rows = _clean(parse_group(files, lambda group: _parse(group, tally)), tally)
    rows = _refuse(rows, _unchanged_weight(rows), "unchanged", tally)
    at_admission = rows.of("Weight") & (rows.minute == 0)
    statics = _statics(rows.where(rows.of(*DESCRIPTORS) & (rows.minute == 0)), len(files))
    observed = rows.where(rows.of(*OBSERVED))
    events = rows.where(rows.of(*EVENTS) & ~at_admission)
    ev_value = np.where(events.of("MechVent"), np.nan, events.value)

    of_stay = zip(
        files,
        statics,
        slices_by_stay(observed.stay, len(files)),
        slices_by_stay(events.stay, len(files)),
        strict=True,
    )
    for file, facts, obs, ev in of_stay:
        yield Episode(
            episode_id=file.name,
            n_hours=RECORD_HOURS,
            obs_variable=VARIABLE[observed.parameter[obs]],
            obs_hours=observed.minute[obs] / 60,
            obs_value=observed.value[obs],
            obs_priority=PRIORITY[observed.parameter[obs]],
            ev_code=CODE[events.parameter[ev]],
            ev_hours=events.minute[ev] / 60,
            ev_value=ev_value[ev],
            statics=facts,
        )


def _unchanged_weight(rows: _Rows) -> NDArray[np.bool_]:
    """Weights that only repeat the last one: 97 % of them, written out again every hour."""
    weights = np.flatnonzero(rows.of("Weight"))
    stay, value = rows.stay[weights], rows.value[weights]
    unchanged = np.zeros(len(rows.value), dtype=bool)
    unchanged[weights[1:]] = (stay[1:] == stay[:-1]) & (value[1:] == value[:-1])
    return unchanged


def _parse(files: Sequence[RecordFile], tally: Tally) -> _Rows:
    """All rows with a known parameter and a value. Raises ValueError for a malformed file."""
    bodies = [_body(file.content) for file in files]
    term = pa.dictionary(pa.int32(), pa.string())
    table = pa_csv.read_csv(
        pa.BufferReader(b"".join(bodies)),
        read_options=pa_csv.ReadOptions(
            column_names=["time", "parameter", "value"], use_threads=False
        ),
        parse_options=pa_csv.ParseOptions(ignore_empty_lines=False),
        convert_options=pa_csv.ConvertOptions(
            column_types={"time": term, "parameter": term, "value": pa.float64()}
        ),
    )
    stay = np.repeat(np.arange(len(files)), [body.count(b"\n") for body in bodies])
    times, time_of = _terms(table["time"])
    minute = np.array([_minutes(t) for t in times], dtype=np.int64)[time_of]
    names, name_of = _terms(table["parameter"])
    parameter = np.array([INDEX.get(n, -1) for n in names], dtype=np.int64)[name_of]
    rows = _Rows(stay, parameter, minute, table["value"].to_numpy())

    ids = rows.where(rows.of("RecordID"))
    if list(zip(ids.stay, ids.value, strict=True)) != [
        (i, float(file.name)) for i, file in enumerate(files)
    ]:
        raise ValueError("no single RecordID row that agrees with the name of the file")
    known = parameter >= 0
    tally.refuse("unknown-parameter", [n or "(empty)" for n in names], name_of[~known])
    rows = rows.where(known)
    return _refuse(rows, ~np.isfinite(rows.value), "no-value", tally)


def _body(content: bytes) -> bytes:
    """The rows of a record file, each with its line end."""
    content = content.replace(b"\r\n", b"\n")
    if not content.startswith(_HEADER):
        raise ValueError(f"the first line is not {_HEADER.decode().strip()!r}")
    return content[len(_HEADER) :].rstrip(b"\n") + b"\n"


def _terms(column: pa.ChunkedArray) -> tuple[list[str], NDArray[np.int32]]:
    """Distinct values of a dictionary column, and which of them each row has."""
    encoded = column.unify_dictionaries().combine_chunks()
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy()


def _minutes(clock: str) -> int:
    """Minutes of "HH:MM" since admission; hours above 24 are normal."""
    hours, colon, minutes = clock.partition(":")
    if not (colon and hours.isdecimal() and minutes.isdecimal() and int(minutes) < 60):
        raise ValueError(f"time {clock!r} is not HH:MM")
    return int(hours) * 60 + int(minutes)


def _clean(rows: _Rows, tally: Tally) -> _Rows:
    """Repaired and possible rows, one for each stay, time and parameter, sorted in that order."""
    descriptor = rows.of(*DESCRIPTORS) & (rows.minute == 0)
    rows = _repair(rows.where(~(descriptor & (rows.value == _MISSING))), tally)
    for (low, high), reason in ((POSSIBLE_RANGE, "impossible"), (LIMITS, "outside-limits")):
        outside = (rows.value < low[rows.parameter]) | (rows.value > high[rows.parameter])
        rows = _refuse(rows, outside, reason, tally)
    order = np.lexsort((rows.parameter, rows.minute, rows.stay))  # stable: keeps the file's order
    rows = rows.where(order)
    key = np.stack([rows.stay, rows.minute, rows.parameter])
    superseded = np.zeros(len(rows.value), dtype=bool)
    superseded[:-1] = (key[:, 1:] == key[:, :-1]).all(axis=0)
    return _refuse(rows, superseded, "superseded", tally)


def _refuse(rows: _Rows, bad: NDArray[np.bool_], reason: str, tally: Tally) -> _Rows:
    tally.refuse(reason, PARAMETERS, rows.parameter[bad])
    return rows.where(~bad)


def _repair(rows: _Rows, tally: Tally) -> _Rows:
    value = rows.value.copy()
    untouched = np.ones(len(value), dtype=bool)
    for rule in REPAIRS:
        candidates = np.flatnonzero(rows.of(rule.parameter) & untouched)
        hit = candidates[rule.applies(rows.value[candidates])]
        value[hit] = rule.repaired(rows.value[hit])
        untouched[hit] = False
        if hit.size:
            tally.repaired[f"{rule.reason}:{rule.parameter}"] += hit.size
    return _Rows(rows.stay, rows.parameter, rows.minute, value)


def _statics(rows: _Rows, n_stays: int) -> list[Statics]:
    """Static facts of each stay from its rows at admission."""
    table = np.full((n_stays, len(PARAMETERS)), np.nan)
    table[rows.stay, rows.parameter] = rows.value
    age, gender, height, unit, weight = (
        table[:, INDEX[p]].tolist() for p in ("Age", "Gender", "Height", "ICUType", "Weight")
    )
    return [
        Statics(
            age_years=_known(age[i]),
            sex=_SEX.get(gender[i]),
            unit_type=_UNIT_TYPE.get(unit[i]),
            height_cm=_known(height[i]),
            weight_kg=_known(weight[i]),
        )
        for i in range(n_stays)
    ]


def _known(value: float) -> float | None:
    return None if np.isnan(value) else value


def _read_outcomes(file: Path, tally: Tally) -> dict[str, Outcome] | None:
    """Labels by RecordID; None if there is no such file."""
    if not file.exists():
        return None
    with file.open(newline="", encoding="ascii") as stream:
        try:
            return {row["RecordID"]: _outcome(row, tally) for row in csv.DictReader(stream)}
        except (KeyError, TypeError, ValueError) as error:
            raise SourceError(f"{file}: not an outcomes file: {error!r}") from error


def _outcome(row: Mapping[str, str], tally: Tally) -> Outcome:
    days, survival = int(row["Length_of_stay"]), int(row["Survival"])
    died = {"0": False, "1": True}[row["In-hospital_death"]]
    if 0 <= days * 24 < RECORD_HOURS:
        tally.refused["shorter-than-record:Length_of_stay"] += 1
    death = max(RECORD_HOURS, 24 * survival) if died and survival >= 0 else None
    return Outcome(
        mortality=died,
        los_hours=24.0 * days if days * 24 >= RECORD_HOURS else None,
        death_hours_low=None if death is None else float(death),
        death_hours_high=None if death is None else float(death + 24),
    )
