"""The Glasgow coma scale: scores from charted text, and totals from its three components.

MIMIC-III before 2008 charts "3 To speech", later records and MIMIC-IV "To Speech"; neither of the
later ones charts a total.
"""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

CARRIED_HOURS = 6.0
"""How long a component that was not charted again still counts."""

NORMAL: Mapping[str, float] = {"eye": 4.0, "verbal": 5.0, "motor": 6.0}
"""The components and the score of each in a patient who is awake."""

# No two components share words for different scores, so the words alone tell the score. "None" is
# eye opening; a patient with a tube cannot speak, which scores as no response.
_WORDS: Mapping[str, float] = {
    "none": 1, "no response": 1, "no response-ett": 1, "et/trach": 1,
    "to pain": 2, "to speech": 3, "spontaneously": 4,
    "incomprehensible sounds": 2, "incomp sounds": 2, "inappropriate words": 3,
    "inapprop words": 3, "confused": 4, "oriented": 5,
    "abnormal extension": 2, "abnorm extensn": 2, "abnormal flexion": 3, "abnorm flexion": 3,
    "flex-withdraws": 4, "localizes pain": 5, "obeys commands": 6,
}  # fmt: skip
_LEADING_DIGIT = r"^([1-6])(?:\.0+)?(?:[^0-9.]|$)"


def score_of(text: pl.Expr) -> pl.Expr:
    """Score of a component as charted: its leading digit, else its words; null if neither.

    The case of the words does not matter.
    """
    words = text.str.strip_chars()
    by_words = words.str.to_lowercase().replace_strict(
        _WORDS, default=None, return_dtype=pl.Float64
    )
    return pl.coalesce(words.str.extract(_LEADING_DIGIT).cast(pl.Float64), by_words)


def totals(components: pl.DataFrame) -> pl.DataFrame:
    """Totals at every time at which any component was charted.

    `components`: stay Int32, hours Float64, available_hours Float64 (null: at once), component
    ('eye', 'verbal' or 'motor'), value Float64 (null values are ignored). A component charted twice
    at one time counts with its last available, then its largest value. One that was not charted at
    that time is carried from the last 6 hours, otherwise taken as normal. Nothing later is used.

    Result, sorted: stay, hours, available_hours (the latest of those used; null: at once), value.
    """
    known_at = pl.max_horizontal("available_hours", "hours")
    charted = (
        components.drop_nulls("value")
        .with_columns(known=known_at)
        .sort("stay", "hours", "known", "value")
        .group_by("stay", "hours", maintain_order=True)
        .agg(
            pl.col(column).filter(pl.col("component") == name).last().alias(f"{column}_{name}")
            for name in NORMAL
            for column in ("value", "known")
        )
        .with_columns(
            pl.when(pl.col(f"value_{name}").is_not_null()).then("hours").alias(f"hours_{name}")
            for name in NORMAL
        )
    )
    carried = charted.with_columns(
        pl.col(f"{column}_{name}").forward_fill().over("stay")
        for name in NORMAL
        for column in ("value", "known", "hours")
    )
    counts = {name: pl.col("hours") - pl.col(f"hours_{name}") <= CARRIED_HOURS for name in NORMAL}
    value = [
        pl.when(counts[name]).then(f"value_{name}").otherwise(pl.lit(normal))
        for name, normal in NORMAL.items()
    ]
    known = pl.max_horizontal(pl.when(counts[name]).then(f"known_{name}") for name in NORMAL)
    return carried.select(
        "stay",
        "hours",
        available_hours=pl.when(known > pl.col("hours")).then(known),
        value=pl.sum_horizontal(value),
    )
