"""How the MIMIC-III benchmark reads values, with its quirks, for comparison with its figures.

Nothing here should be copied into a new design. The benchmark divides nearly every FiO2 by 100,
also one that is a fraction, reads a body temperature of 79 or more as Fahrenheit, takes urine for
blood, has no coma score for half of the stays, and compares numbers as text.
"""

from __future__ import annotations

import polars as pl

from training.data.mimic.shared import refuse
from training.data.sources import Tally

# The values of these are not cleaned, so they are still text when the largest is chosen.
_COMPARED_AS_TEXT = ("hr", "mbp", "rr", "gcs_total")
_PLAIN_NUMBER = r"^(\d+(\.\d*)?|\.\d+)$"


def benchmark_observations(rows: pl.DataFrame, items: pl.DataFrame, tally: Tally) -> pl.DataFrame:
    """Observations as the benchmark makes them, one for each time and variable.

    `rows` of the charts and the laboratory: stay, itemid, hours, text, unit. `items`: itemid and
    variable of all that the benchmark maps.
    """
    rows = rows.join(items.select("itemid", "variable"), on="itemid").drop_nulls("text")
    components = ("gcs_eye", "gcs_verbal", "gcs_motor")
    rows = rows.filter(~pl.col("variable").is_in(components))  # no input of the 11 variables
    text, variable = pl.col("text"), pl.col("variable")
    pair = text.str.extract_groups(r"^(?<sbp>\d+)/(?<dbp>\d+)$")
    plain = pl.when(text.str.contains(_PLAIN_NUMBER)).then(text).cast(pl.Float64, strict=False)
    charted = text.cast(pl.Float64, strict=False)
    is_torr = pl.col("unit").fill_null("").str.to_lowercase().str.contains("torr", literal=True)
    value = (
        pl.when(variable == "sbp")
        .then(pl.coalesce(pair.struct.field("sbp").cast(pl.Float64), charted))
        .when(variable == "dbp")
        .then(pl.coalesce(pair.struct.field("dbp").cast(pl.Float64), charted))
        .when(variable == "fio2")
        .then(pl.when(is_torr).then(charted).otherwise(charted / 100))
        .when(variable == "spo2")
        .then(pl.when(plain <= 1).then(plain * 100).otherwise(plain))
        .when(variable == "temp")
        .then(pl.when(charted >= 79).then((charted - 32) * 5 / 9).otherwise(charted))
        .when(variable.is_in(("glucose", "ph")))
        .then(plain)
        .otherwise(charted)
    )
    rows = rows.with_columns(value=value)
    rows = refuse(rows, pl.col("value").is_null(), "text-result", tally)
    as_text = pl.when(variable.is_in(_COMPARED_AS_TEXT)).then(text)
    key = ["stay", "hours", "variable"]
    largest = (
        rows.with_columns(_text=as_text)
        .sort(*key, "_text", "value")
        .unique(key, keep="last", maintain_order=True)
    )
    if len(largest) < len(rows):
        tally.refused["same-time:observation"] += len(rows) - len(largest)
    return largest.select(
        "stay",
        "variable",
        "hours",
        "value",
        available_hours=pl.lit(None, pl.Float64),
        priority=pl.lit(0, pl.Int8),
    ).select("stay", "variable", "hours", "available_hours", "value", "priority")
