"""Phenotypes from diagnosis codes: the published lists, the prefixes, and how well they agree."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.phenotype_agreement import agreement, read, split_codes
from training.data.phenotypes import PHENOTYPES, of_codes, phenotypes
from training.data.tables import load

RENAL, CEREBRAL, INFARCTION = PHENOTYPES[:3]
DYSRHYTHMIAS, KIDNEY, COPD, COMPLICATIONS, CONDUCTION, FAILURE, CORONARY = PHENOTYPES[3:10]
DIABETES, MILD_DIABETES, LIPIDS, HYPERTENSION, FLUID, BLEEDING, HYPERTENSIVE = PHENOTYPES[10:17]
LIVER, LOWER, UPPER, PLEURISY, PNEUMONIA, RESPIRATORY, SEPTICEMIA, SHOCK = PHENOTYPES[17:]


def of(version: int, code: str) -> set[str]:
    coded = pl.DataFrame({"icd_version": [version], "icd_code": [code]})
    return set(of_codes(coded)["phenotype"])


def test_names_are_alphabetical_and_the_lists_are_as_published() -> None:
    assert len(PHENOTYPES) == 25
    assert list(PHENOTYPES) == sorted(PHENOTYPES)
    codes = load("phenotypes_icd9")
    assert len(codes) == 767
    assert codes["icd_code"].is_unique().all()  # a code is in one group only
    counts = of_codes(codes.select(icd_version=pl.lit(9), icd_code="icd_code"))["phenotype"]
    published = (6, 25, 40, 13, 19, 15, 145, 28, 16, 20, 57, 12, 5, 2, 15, 40, 38, 24, 62, 60, 17)
    published += (62, 16, 26, 4)
    assert [counts.to_list().count(name) for name in PHENOTYPES] == list(published)


def test_icd9_is_matched_exactly() -> None:
    assert of(9, "584.9") == of(9, "5849") == {RENAL}
    assert of(9, "v45.1") == {KIDNEY}
    assert of(9, "58491") == of(9, "584") == set()
    assert of(9, "I214") == set()  # a code of the other version


def test_every_icd10_prefix_belongs_to_a_known_group() -> None:
    prefixes = load("phenotypes_icd10")
    assert set(prefixes["ccs"].drop_nulls()) == set(load("phenotypes_icd9")["ccs"])
    assert prefixes["prefix"].str.contains("^[A-Z][0-9][0-9A-Z]{1,4}$").all()
    assert not prefixes.select("prefix", "ccs").is_duplicated().any()
    # An exclusion, and a second group, make sense only inside a shorter prefix or beside a group.
    known = set(prefixes.drop_nulls("ccs")["prefix"])
    for prefix in prefixes.filter(pl.col("ccs").is_null())["prefix"]:
        assert prefix not in known
        assert any(prefix.startswith(shorter) for shorter in known), prefix


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("N17.9", {RENAL}),
        ("I63.9", {CEREBRAL}),
        ("I21.4", {INFARCTION}),
        ("I48.91", {DYSRHYTHMIAS}),
        ("I49.01", set()),  # ventricular fibrillation is in the group of cardiac arrest
        ("N18.6", {KIDNEY}),
        ("J44.1", {COPD}),
        ("T81.4XXA", {COMPLICATIONS}),
        ("T88.7XXA", {COMPLICATIONS}),
        ("T80.211A", set()),  # infection of a central line: a complication of a device
        ("J95.821", {RESPIRATORY}),  # inside J95, complications of procedures
        ("J95.811", {COMPLICATIONS}),
        ("I44.2", {CONDUCTION}),
        ("I50.33", {FAILURE}),
        ("I25.10", {CORONARY}),
        ("I25.41", set()),  # coronary aneurysm
        ("E11.65", {DIABETES}),
        ("E11.9", {MILD_DIABETES}),
        ("E78.5", {LIPIDS}),
        ("I10", {HYPERTENSION}),
        ("E87.1", {FLUID}),
        ("E87.71", {COMPLICATIONS}),  # fluid overload by transfusion
        ("K92.2", {BLEEDING}),
        ("K25.4", {BLEEDING}),
        ("K25.7", set()),  # an ulcer that does not bleed
        ("I13.0", {HYPERTENSIVE}),
        ("K74.60", {LIVER}),
        ("J84.10", {LOWER}),
        ("Z93.0", {UPPER}),
        ("J90", {PLEURISY}),
        ("J91.0", set()),  # malignant
        ("J18.9", {PNEUMONIA}),
        ("J18.2", {LOWER}),  # hypostatic pneumonia was pulmonary congestion
        ("J69.0", set()),  # aspiration has a group of its own
        ("J96.01", {RESPIRATORY}),
        ("A41.9", {SEPTICEMIA}),
        ("R65.20", {SEPTICEMIA}),
        ("R65.21", {SEPTICEMIA, SHOCK}),
        ("R65.10", set()),
        ("R57.0", {SHOCK}),
    ],
)
def test_icd10(code: str, expected: set[str]) -> None:
    assert of(10, code) == of(10, code.replace(".", "")) == of(10, code.lower()) == expected


def test_a_code_shorter_than_every_prefix_is_in_no_group() -> None:
    assert of(10, "I2") == of(10, "R65") == of(10, "") == set()


def test_phenotypes_of_stays() -> None:
    diagnoses = pl.DataFrame(
        {
            "stay": [2, 1, 2, 2, 3, 4, 5],
            "icd_version": [9, 9, 10, 9, 9, 9, 10],
            "icd_code": ["584.9", "4019", "N179", "486", "V1234", None, " "],
        }
    )
    assert phenotypes(diagnoses).rows() == [
        (1, [HYPERTENSION]),
        (2, [RENAL, PNEUMONIA]),  # sorted, once each
        (3, []),  # coded, but without any of the phenotypes
    ]  # 4 and 5 are not coded


def test_phenotypes_of_nothing() -> None:
    empty = pl.DataFrame(schema={"stay": pl.Int32, "icd_version": pl.Int32, "icd_code": pl.String})
    assert phenotypes(empty).schema == {"stay": pl.Int32, "phenotypes": pl.List(pl.String)}


_CODES = st.tuples(
    st.integers(1, 4),
    st.sampled_from([9, 10]),
    st.one_of(
        st.sampled_from(["4019", "I10", "R6521", "J9581", "E119", "zzz"]),
        st.from_regex(r"[A-Z][0-9][0-9A-Z]{1,4}", fullmatch=True),
    ),
)


@given(st.lists(_CODES, min_size=1))
def test_a_stay_has_the_phenotypes_of_each_of_its_codes(rows: list[tuple[int, int, str]]) -> None:
    columns = ("stay", "icd_version", "icd_code")
    diagnoses = pl.DataFrame(rows, schema=columns, orient="row")
    expected: dict[int, set[str]] = {}
    for stay, version, code in rows:
        if any(c.isdigit() for c in code):
            expected.setdefault(stay, set()).update(of(version, code))
    found = dict(phenotypes(diagnoses).rows())
    assert found == {stay: sorted(names) for stay, names in expected.items()}


def test_codes_that_stand_side_by_side() -> None:
    rows = pl.DataFrame(
        {"stay": [1, 2, 3], "icd9code": ["E980.2, 965.00, T40.60", "276.1, E87.0, E87.1", "31.1"]}
    )
    assert sorted(split_codes(rows).rows()) == [
        (1, "965.00", 9),
        (1, "E980.2", 9),
        (1, "T40.60", 10),
        (2, "276.1", 9),
        (2, "E87.0", 10),
        (2, "E87.1", 10),
    ]  # 31.1 is not a diagnosis of either


def test_agreement_counts_stays_and_names_the_rows_that_disagree() -> None:
    table, rows = agreement(
        pl.DataFrame(
            {
                "stay": [1, 1, 2, 3],
                "icd9code": ["401.9, I10", "401.9, I10", "401.0, I10", "518.82"],
            }
        )
    )
    hypertension = table.row(by_predicate=pl.col("phenotype") == HYPERTENSION, named=True)
    assert (hypertension["both"], hypertension["only_icd9"], hypertension["only_icd10"]) == (
        1,
        0,
        1,
    )
    assert set(rows.rows()) == {
        ("401.0, I10", HYPERTENSION, False, True, 1),
        ("401.0, I10", HYPERTENSIVE, True, False, 1),
    }


# Rows whose codes do not mean the same, see docs/datasets/phenotypes.md. All others must agree.
NOT_EQUIVALENT = {
    "790.6, R73.9": 336,  # abnormal blood chemistry; high blood sugar
    "799.02, J96.91": 279,  # hypoxemia; respiratory failure with hypoxia
    "785.52, R65.21": 172,  # septic shock; severe sepsis with septic shock
    "786.09, J96.92": 72,  # other respiratory abnormality; respiratory failure with hypercapnia
    "401.0, I10": 69,  # malignant hypertension; hypertension
    "425.8, I25.5": 59,  # cardiomyopathy in other diseases; ischemic cardiomyopathy
    "785.59, R65.21": 37,  # other shock; severe sepsis with septic shock
    "518.4, E980.2, 965.00, T40.60": 12,
    "513.0, 510.9, J85.2": 6,
    "599.60, N17.9": 4,
    "786.00, R06.1": 4,
    "584.9, 965.4, E980.0, T39.1X": 3,
    "995.91, R65": 3,
    "135, 517.8, D86.9": 2,
    "530.82, K22.8": 1,
    "535.01, K92.2": 1,
}


def test_agreement_on_rows_with_codes_of_both_versions(llm4ehr_data: Path) -> None:
    table, rows = agreement(read(llm4ehr_data / "eicu-demo-2.0.1" / "diagnosis.csv.gz"))
    disagreeing = rows.unique("icd9code").select("icd9code", "rows").rows()
    assert dict(disagreeing) == NOT_EQUIVALENT
    kappa = dict(table.select("phenotype", "kappa").rows())
    assert {name for name, k in kappa.items() if k < 0.9} == {MILD_DIABETES, HYPERTENSIVE, LOWER}
    assert sum(k == 1 for k in kappa.values()) == 15
