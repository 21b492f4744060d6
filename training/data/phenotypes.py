"""The 25 phenotypes of the MIMIC-III benchmark, from the diagnosis codes of a stay.

A phenotype is one group of the Clinical Classifications Software (CCS) of the Healthcare Cost and
Utilization Project (HCUP). ICD-9-CM codes are matched exactly, as the benchmark does. ICD-10-CM
codes are matched by prefix: the longest prefix of the table that a code begins with decides. See
docs/datasets/phenotypes.md for where the table comes from and how well it agrees.
"""

from __future__ import annotations

from functools import cache

import polars as pl

from training.data.tables import load

PHENOTYPES: tuple[str, ...] = (
    "Acute and unspecified renal failure",
    "Acute cerebrovascular disease",
    "Acute myocardial infarction",
    "Cardiac dysrhythmias",
    "Chronic kidney disease",
    "Chronic obstructive pulmonary disease and bronchiectasis",
    "Complications of surgical procedures or medical care",
    "Conduction disorders",
    "Congestive heart failure; nonhypertensive",
    "Coronary atherosclerosis and other heart disease",
    "Diabetes mellitus with complications",
    "Diabetes mellitus without complication",
    "Disorders of lipid metabolism",
    "Essential hypertension",
    "Fluid and electrolyte disorders",
    "Gastrointestinal hemorrhage",
    "Hypertension with complications and secondary hypertension",
    "Other liver diseases",
    "Other lower respiratory disease",
    "Other upper respiratory disease",
    "Pleurisy; pneumothorax; pulmonary collapse",
    "Pneumonia (except that caused by tuberculosis or sexually transmitted disease)",
    "Respiratory failure; insufficiency; arrest (adult)",
    "Septicemia (except in labor)",
    "Shock",
)
"""Names in the published, alphabetical order, which is also the order of a head's outputs."""

_CCS = (
    "157", "109", "100", "106", "158", "127", "238", "105", "108", "101", "50", "49", "53", "98",
    "55", "153", "99", "151", "133", "134", "130", "122", "131", "2", "249",
)  # fmt: skip


def phenotypes(diagnoses: pl.DataFrame) -> pl.DataFrame:
    """The phenotypes of each coded stay.

    `diagnoses`: `stay` (any key), `icd_version` (9 or 10) and `icd_code` (text, with or without
    dots). Result: one row per key in rising order, `stay` and `phenotypes` (sorted names, empty
    where no code belongs to any). A row without a code says nothing, so a stay that has no other
    does not appear.
    """
    coded = diagnoses.filter(pl.col("icd_code").str.contains("[0-9]"))
    found = coded.join(of_codes(coded), on=("icd_version", "icd_code"), how="left")
    return (
        found.group_by("stay")
        .agg(phenotypes=pl.col("phenotype").drop_nulls().unique().sort())
        .sort("stay")
    )


def of_codes(codes: pl.DataFrame) -> pl.DataFrame:
    """The phenotypes of each code that has any, one a row.

    `codes`: `icd_version` and `icd_code`, as for `phenotypes`; result: these and `phenotype`. An
    ICD-9-CM code belongs to one at most, an ICD-10-CM code sometimes to two.
    """
    without_dots = pl.col("icd_code").str.replace_all(".", "", literal=True).str.strip_chars()
    unique = codes.select("icd_version", "icd_code", _code=without_dots.str.to_uppercase()).unique()
    icd9, icd10 = _tables()
    exact = unique.filter(icd_version=9).join(icd9, left_on="_code", right_on="icd_code")
    by_length = [
        unique.filter(icd_version=10)
        .with_columns(prefix=pl.col("_code").str.slice(0, length), _length=pl.lit(length))
        .filter(pl.col("prefix").str.len_chars() == length)
        .join(icd10, on="prefix")
        for length in icd10["prefix"].str.len_chars().unique().sort()
    ]
    matched = pl.concat(by_length)
    longest = pl.col("_length") == pl.col("_length").max().over("icd_code")
    columns = ("icd_version", "icd_code", "phenotype")
    return pl.concat([exact.select(columns), matched.filter(longest).select(columns)]).drop_nulls(
        "phenotype"
    )


@cache
def _tables() -> tuple[pl.DataFrame, pl.DataFrame]:
    """Phenotype of each ICD-9-CM code, and of each ICD-10-CM prefix (null: in none)."""
    by_group = pl.DataFrame({"ccs": _CCS, "phenotype": PHENOTYPES})
    icd9 = load("phenotypes_icd9").join(by_group, on="ccs")
    icd10 = load("phenotypes_icd10").join(by_group, on="ccs", how="left")
    return icd9.select("icd_code", "phenotype"), icd10.select("prefix", "phenotype")
