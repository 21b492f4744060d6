"""Units as MIMIC spells them, in UCUM, and values brought into the usual unit of their item."""

from __future__ import annotations

import polars as pl

# Upper and lower case are mixed in the source ("MEQ/L"), so spellings are matched in lower case.
_UCUM = {
    "+/-": "1", "n/a": "1", "pos/neg": "1", "u/g/hb": "U/g{Hb}",
    "#/hpf": "/[HPF]", "#/lpf": "/[LPF]", "#/ul": "/uL", "%": "%", "/hpf": "/[HPF]",
    "eu/dl": "[EU]/dL", "fl": "fL", "g/dl": "g/dL", "gpl": "[GPL'U]", "hrs": "h", "hours": "h",
    "iu/l": "U/L", "u/l": "U/L", "iu/ml": "[iU]/mL", "k/ul": "10*3/uL", "l/min": "L/min",
    "log10 copies/ml": "{log10_copies}/mL", "log10 cop/ml": "{log10_copies}/mL",
    "log10 iu/ml": "{log10_IU}/mL", "m/ul": "10*6/uL", "meq/l": "meq/L", "mg/24hr": "mg/(24.h)",
    "mg/dl": "mg/dL", "mg/g": "mg/g", "mg/l": "mg/L", "mg/mg": "1", "min": "min",
    "miu/ml": "m[IU]/mL", "ml": "mL", "ml/min": "mL/min", "mm hg": "mm[Hg]", "mm/hr": "mm/h",
    "mmol/l": "mmol/L", "mosm/kg": "mosm/kg", "mpl": "[MPL'U]", "ng/dl": "ng/dL",
    "ng/ml": "ng/mL", "ng/ml feu": "ng{FEU}/mL", "pg": "pg", "pg/ml": "pg/mL", "ratio": "1",
    "sec": "s", "seconds": "s", "u/ml": "U/mL", "ug/dl": "ug/dL", "ug/ml": "ug/mL",
    "uiu/ml": "u[IU]/mL", "umol/l": "umol/L", "units": "1", "uu/ml": "u[IU]/mL",
    # rates of infusions
    "grams/hour": "g/h", "grams/kg/min": "g/kg/min", "grams/min": "g/min", "mcg/hour": "ug/h",
    "mcg/kg/hour": "ug/kg/h", "mcg/kg/min": "ug/kg/min", "mcg/min": "ug/min", "meq./hour": "meq/h",
    "mg/hour": "mg/h", "mg/kg/hour": "mg/kg/h", "mg/kg/min": "mg/kg/min", "mg/min": "mg/min",
    "ml/hour": "mL/h", "ml/kg/hour": "mL/kg/h", "units/hour": "[iU]/h",
    "units/kg/hour": "[iU]/kg/h", "units/min": "[iU]/min",
}  # fmt: skip

# Units of one kind of quantity, and how many of the kind's base unit each is.
_SCALES = {
    "concentration": {
        "g/dL": 1e4, "mg/dL": 10.0, "mg/L": 1.0, "ug/mL": 1.0, "ug/dL": 1e-2, "ug/L": 1e-3,
        "ng/mL": 1e-3, "ng/dL": 1e-5, "pg/mL": 1e-6,
    },
    "count": {"/uL": 1.0, "10*3/uL": 1e3, "10*6/uL": 1e6},
    "mass rate": {
        "g/h": 1e6, "g/min": 6e7, "mg/h": 1e3, "mg/min": 6e4, "ug/h": 1.0, "ug/min": 60.0,
    },
    "mass rate by weight": {
        "g/kg/min": 6e7, "mg/kg/h": 1e3, "mg/kg/min": 6e4, "ug/kg/h": 1.0, "ug/kg/min": 60.0,
    },
    "volume rate": {"mL/h": 1.0, "mL/min": 60.0},
    "unit rate": {"[iU]/h": 1.0, "[iU]/min": 60.0},
}  # fmt: skip
_SCALE = pl.DataFrame(
    [(unit, kind, n) for kind, units in _SCALES.items() for unit, n in units.items()],
    schema={"unit": pl.String, "kind": pl.String, "n": pl.Float64},
    orient="row",
)


def in_usual_unit(rows: pl.DataFrame) -> pl.DataFrame:
    """Bring values into the usual unit of their code.

    `rows` has code, value, unit (as spelled in the source; null: the usual one) and usual (UCUM;
    null: none is known). A value in a unit that cannot be converted gets another code, with the
    unit at its end. Result: the same columns, where `usual` is the unit of the value (UCUM).
    """
    # An unknown spelling becomes a UCUM annotation, so that it still keeps its values apart.
    spelled = "{" + pl.col("unit").str.replace_all(r"[^!-z|~]+", "_") + "}"
    lower = pl.col("unit").str.strip_chars().str.to_lowercase()
    known = lower.replace_strict(_UCUM, default=None, return_dtype=pl.String)
    scaled = (
        rows.with_columns(_unit=pl.when(lower != "").then(pl.coalesce(known, spelled)))
        .join(_SCALE, left_on="_unit", right_on="unit", how="left", maintain_order="left")
        .join(
            _SCALE, left_on="usual", right_on="unit", how="left", suffix="_usual",
            maintain_order="left",
        )
    )  # fmt: skip
    usual = pl.col("_unit").is_null() | (pl.col("_unit") == pl.col("usual")).fill_null(False)
    same_kind = (pl.col("kind") == pl.col("kind_usual")).fill_null(False)
    other = ~usual & ~same_kind & pl.col("value").is_not_null()
    return scaled.with_columns(
        value=pl.when(~usual & same_kind)
        .then(pl.col("value") * pl.col("n") / pl.col("n_usual"))
        .otherwise("value"),
        code=pl.when(other).then(pl.col("code") + "//" + pl.col("_unit")).otherwise("code"),
        usual=pl.when(other).then("_unit").otherwise("usual"),
    ).select(rows.columns)
