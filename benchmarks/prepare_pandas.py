"""The baseline of prepare.py: MIMIC-III patient by patient in plain pandas.

`python -m benchmarks.prepare_pandas --source FOLDER --out FOLDER`

The steps are those of the published MIMIC-III benchmark (Harutyunyan et al. 2019): read the chart
and laboratory events, split them by subject; for each subject assign the rows to stays, map items
to variables, convert units, order, pivot to one column a variable, and write hourly bins with the
last value of each variable, one CSV file a stay; beside them one table with the labels. Cohort,
item map and unit conversions are those of `training prepare mimic3`.

Whole tables are read with the C parser of pandas, where the published code goes row by row through
a Python loop; so this is the faster of the two, and needs memory in proportion to the tables.

It does not do: events (infusions, procedures, other laboratory results), result times of
laboratory values, hard limits, duplicates, the total of the Glasgow coma scale from its components,
checks of the source, counts of what was refused, a report, quality gates, or going on after a stop.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

TABLES = Path(__file__).parents[1] / "training" / "data" / "tables"
EVENT_COLUMNS = {
    "subject_id": "int64",
    "hadm_id": "Int64",
    "icustay_id": "Int64",
    "itemid": "int64",
    "charttime": "str",
    "value": "str",
    "valueuom": "str",
}
COMA_WORDS = {  # a score without its leading digit
    "none": 1,
    "to pain": 2,
    "to speech": 3,
    "spontaneously": 4,
    "no response": 1,
    "no response-ett": 1,
    "abnormal extension": 2,
    "abnormal flexion": 3,
    "flex-withdraws": 4,
    "localizes pain": 5,
    "obeys commands": 6,
    "incomprehensible sounds": 2,
    "inappropriate words": 3,
    "confused": 4,
    "oriented": 5,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    a.out.mkdir(parents=True)

    items = pd.read_csv(TABLES / "mimic3_items.csv")
    items = items.loc[items["strict"] == 1, ["itemid", "variable", "fahrenheit"]]
    stays = cohort(a.source)
    charts = read(a.source, "CHARTEVENTS", EVENT_COLUMNS)
    lab_columns = {c: t for c, t in EVENT_COLUMNS.items() if c != "icustay_id"}
    labs = read(a.source, "LABEVENTS", lab_columns)
    events = pd.concat([charts, labs], ignore_index=True)
    del charts, labs

    stays_of = dict(iter(stays.groupby("subject_id")))
    written = []
    for subject, rows in events.groupby("subject_id"):
        if subject in stays_of:
            written += write_subject(rows, stays_of[subject], items, a.out)
    labels = stays[stays["icustay_id"].isin(written)].drop(columns="intime")
    labels.to_csv(a.out / "labels.csv", index=False)
    print(f"{len(written)} stays")


def read(source: Path, name: str, columns: dict[str, str]) -> pd.DataFrame:
    """Columns of a table, named in lower case. "None" is a score of the coma scale, not a gap."""
    frame = pd.read_csv(
        source / f"{name}.csv.gz",
        usecols=lambda c: c.lower() in columns,
        dtype=columns | {c.upper(): t for c, t in columns.items()},
        keep_default_na=False,
        na_values=[""],
    )
    return frame.rename(columns=str.lower)


def cohort(source: Path) -> pd.DataFrame:
    """Adults with one stay in one unit and ward per admission, with their labels."""
    stays = read(
        source,
        "ICUSTAYS",
        dict.fromkeys(("subject_id", "hadm_id", "icustay_id"), "int64")
        | dict.fromkeys(("first_wardid", "last_wardid"), "Int64")
        | dict.fromkeys(("first_careunit", "last_careunit", "intime"), "str")
        | {"los": "float64"},
    )
    admissions = read(
        source,
        "ADMISSIONS",
        dict.fromkeys(("subject_id", "hadm_id"), "int64")
        | dict.fromkeys(("admittime", "dischtime", "deathtime"), "str"),
    )
    patients = read(source, "PATIENTS", {"subject_id": "int64", "dob": "str", "dod": "str"})
    stays = stays[
        (stays["first_wardid"] == stays["last_wardid"])
        & (stays["first_careunit"] == stays["last_careunit"])
    ]
    stays = stays.merge(admissions, on=["subject_id", "hadm_id"]).merge(patients, on="subject_id")
    stays = stays[~stays["hadm_id"].duplicated(keep=False)]
    for column in ("intime", "admittime", "dischtime", "deathtime", "dob", "dod"):
        stays[column] = pd.to_datetime(stays[column]).astype("datetime64[s]")
    stays = stays[(stays["intime"] - stays["dob"]).dt.days / 365 >= 18]
    stays["mortality"] = False
    for death in ("dod", "deathtime"):
        stays["mortality"] |= stays[death].between(stays["admittime"], stays["dischtime"])

    diagnoses = read(source, "DIAGNOSES_ICD", {"hadm_id": "int64", "icd9_code": "str"})
    groups = pd.read_csv(TABLES / "phenotypes_icd9.csv", dtype=str)
    diagnoses = diagnoses.merge(groups, left_on="icd9_code", right_on="icd_code")
    flags = pd.crosstab(diagnoses["hadm_id"], diagnoses["ccs"]).gt(0).add_prefix("ccs_")
    stays = stays.merge(flags, left_on="hadm_id", right_index=True, how="left")
    labels = ["mortality", "los", *flags.columns]
    return stays[["subject_id", "hadm_id", "icustay_id", "intime", *labels]]


def write_subject(
    rows: pd.DataFrame, stays: pd.DataFrame, items: pd.DataFrame, out: Path
) -> list[int]:
    """Write the stays of one subject; returns the ids of those that have an observation."""
    rows = rows.dropna(subset=["hadm_id", "value"])
    rows = rows.merge(stays[["hadm_id", "icustay_id"]], on="hadm_id", suffixes=("_given", ""))
    rows = rows[rows["icustay_id_given"].isna() | (rows["icustay_id_given"] == rows["icustay_id"])]
    rows = rows.merge(items, on="itemid")
    rows["value"] = clean(rows)
    rows = rows.dropna(subset=["value"])
    rows["charttime"] = pd.to_datetime(rows["charttime"])
    written = []
    for stay in stays.itertuples():
        own = rows[rows["icustay_id"] == stay.icustay_id].copy()
        own["hours"] = (own["charttime"] - stay.intime).dt.total_seconds() / 3600
        own = own[own["hours"].between(0, 24 * stay.los)]
        if own.empty:
            continue
        own = own.sort_values(["hours", "variable", "value"])
        own = own.drop_duplicates(["hours", "variable"], keep="last")
        series = own.pivot(index="hours", columns="variable", values="value")
        series = series.reindex(columns=sorted(items["variable"].unique()))
        hour = (series.index - 1e-6).astype(int)  # an hour holds the item at its end
        hourly = series.groupby(hour).last()
        hourly = hourly.reindex(range(max(1, int(24 * stay.los + 1 - 1e-6)))).ffill()
        hourly.to_csv(out / f"{stay.icustay_id}.csv", index_label="hour")
        written.append(stay.icustay_id)
    return written


def clean(rows: pd.DataFrame) -> pd.Series:
    """The values as numbers in the unit of their variable; NaN where there is no number."""
    value = pd.to_numeric(rows["value"].str.lstrip("<>"), errors="coerce")
    variable = rows["variable"]
    scores = variable.isin(["gcs_eye", "gcs_motor", "gcs_verbal"])
    text = rows.loc[scores, "value"].str.lower()
    value[scores] = pd.to_numeric(text.str[0], errors="coerce").fillna(text.map(COMA_WORDS))
    fahrenheit = (rows["fahrenheit"] == 1) | ((variable == "temp") & value.between(70, 120))
    value[fahrenheit] = (value[fahrenheit] - 32) * 5 / 9
    percent = (variable == "fio2") & (value > 1)
    value[percent] /= 100
    fraction = (variable == "spo2") & (value <= 1)
    value[fraction] *= 100
    return value


if __name__ == "__main__":
    main()
