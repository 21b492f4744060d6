"""How well the ICD-10-CM prefixes agree with the ICD-9-CM lists, on rows that carry both codes.

`python -m training.data.phenotype_agreement diagnosis.csv.gz` prints the table of
docs/datasets/phenotypes.md for a diagnosis table of eICU.
"""

from __future__ import annotations

import sys
from pathlib import Path

import polars as pl

from training.data.csv_table import CsvTable
from training.data.phenotypes import PHENOTYPES, of_codes

# The codes of accidents and of "factors influencing health" of ICD-9-CM begin with a letter too,
# but have three and two digits before the dot, where ICD-10-CM has two and V is for accidents.
_ICD9 = r"^(\d{3}(\.\d{1,2})?|V\d{2}(\.\d{1,2})?|E\d{3}(\.\d)?)$"
_ICD10 = r"^[A-UW-Z]\d[0-9A-Z](\.[0-9A-Z]{1,4})?$"


def split_codes(diagnoses: pl.DataFrame) -> pl.DataFrame:
    """The codes of `icd9code`, such as "414.00, I25.10", one a row with its `icd_version`.

    All other columns are kept. What looks like a code of neither version is left out.
    """
    code = pl.col("icd_code")
    split = diagnoses.with_columns(icd_code=pl.col("icd9code").str.split(",")).drop("icd9code")
    version = pl.when(code.str.contains(_ICD9)).then(9).when(code.str.contains(_ICD10)).then(10)
    return (
        split.explode("icd_code")
        .with_columns(code.str.strip_chars())
        .with_columns(icd_version=version)
        .drop_nulls("icd_version")
    )


def agreement(diagnoses: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Stays that have each phenotype by either version, and the rows that disagree.

    `diagnoses`: `stay` and `icd9code`; rows that do not carry codes of both versions are ignored.
    First result, one row a phenotype: `both`, `only_icd9`, `only_icd10` (numbers of stays) and
    `kappa` (Cohen's, null where no stay has it). Second: `icd9code`, `phenotype`, `rows`, `icd9`
    and `icd10` (whether the codes of that version give it).
    """
    numbered = diagnoses.select("stay", "icd9code").with_row_index("row")
    codes = split_codes(numbered)
    dual = codes.group_by("row").agg(n=pl.col("icd_version").n_unique()).filter(n=2)
    codes = codes.join(dual, on="row", how="semi")
    found = codes.join(of_codes(codes), on=("icd_version", "icd_code"))
    by_version = [
        (pl.col("icd_version") == version).any().alias(f"icd{version}") for version in (9, 10)
    ]
    n_stays = codes["stay"].n_unique()
    stays = found.group_by("stay", "phenotype").agg(by_version)
    counted = (
        stays.group_by("phenotype")
        .agg(
            both=(pl.col("icd9") & pl.col("icd10")).sum(),
            only_icd9=(pl.col("icd9") & ~pl.col("icd10")).sum(),
            only_icd10=(~pl.col("icd9") & pl.col("icd10")).sum(),
        )
        .with_columns(kappa=_kappa(n_stays))
    )
    table = pl.DataFrame({"phenotype": PHENOTYPES}).join(counted, on="phenotype", how="left")
    counts = pl.col("both", "only_icd9", "only_icd10").fill_null(0)
    rows = (
        found.group_by("row", "phenotype")
        .agg(by_version)
        .filter(pl.col("icd9") != pl.col("icd10"))
        .join(numbered, on="row")
        .group_by("icd9code", "phenotype", "icd9", "icd10")
        .agg(rows=pl.len())
        .sort("rows", "icd9code", "phenotype", descending=[True, False, False])
    )
    return table.with_columns(counts), rows


def _kappa(n: int) -> pl.Expr:
    both, only_9, only_10 = pl.col("both"), pl.col("only_icd9"), pl.col("only_icd10")
    p9, p10 = (both + only_9) / n, (both + only_10) / n
    observed = 1 - (only_9 + only_10) / n
    by_chance = p9 * p10 + (1 - p9) * (1 - p10)
    return (observed - by_chance) / (1 - by_chance)


def read(path: Path) -> pl.DataFrame:
    """`stay` and `icd9code` of eICU's table `diagnosis`."""
    table = CsvTable(path, {"patientunitstayid": pl.Int64, "icd9code": pl.String}).read()
    return table.rename({"patientunitstayid": "stay"}).drop_nulls("icd9code")


if __name__ == "__main__":
    _table, _rows = agreement(read(Path(sys.argv[1])))
    with pl.Config(tbl_rows=-1, tbl_width_chars=150, fmt_str_lengths=80, tbl_formatting="MARKDOWN"):
        print(_table)
        print(_rows)
