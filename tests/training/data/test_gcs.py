"""Glasgow coma scale: scores of charted text, and totals that never use what comes later."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.gcs import CARRIED_HOURS, NORMAL, score_of, totals

SCHEMA = {
    "stay": pl.Int32,
    "hours": pl.Float64,
    "available_hours": pl.Float64,
    "component": pl.String,
    "value": pl.Float64,
}


def components(*rows: tuple) -> pl.DataFrame:
    """Rows of (hours, component, value) or (hours, component, value, available_hours) of stay 0."""
    full = [(0, r[0], r[3] if len(r) > 3 else None, r[1], r[2]) for r in rows]
    return pl.DataFrame(full, SCHEMA, orient="row")


@st.composite
def charted(draw: st.DrawFn) -> pl.DataFrame:
    """Components of up to three stays on a grid of half hours, some entered late."""
    rows = draw(
        st.lists(
            st.tuples(
                st.integers(0, 2),
                st.integers(-4, 40).map(lambda n: n / 2),
                st.none() | st.integers(0, 20).map(lambda n: n / 2),
                st.sampled_from(sorted(NORMAL)),
                st.integers(1, 4).map(float) | st.none(),
            ),
            max_size=40,
        )
    )
    late = [(s, h, None if d is None else h + d, c, v) for s, h, d, c, v in rows]
    return pl.DataFrame(late, SCHEMA, orient="row")


@pytest.mark.parametrize(
    ("text", "score"),
    [
        # Every text of items 184, 454, 723, 220739, 223901 and 223900 in the MIMIC-III demo.
        ("4 Spontaneously", 4), ("3 To speech", 3), ("2 To pain", 2), ("1 No Response", 1),
        ("Spontaneously", 4), ("To Speech", 3), ("To Pain", 2), ("None", 1),
        ("6 Obeys Commands", 6), ("5 Localizes Pain", 5), ("4 Flex-withdraws", 4),
        ("3 Abnorm flexion", 3), ("2 Abnorm extensn", 2),
        ("Obeys Commands", 6), ("Localizes Pain", 5), ("Flex-withdraws", 4),
        ("Abnormal Flexion", 3), ("Abnormal extension", 2), ("No response", 1),
        ("5 Oriented", 5), ("4 Confused", 4), ("3 Inapprop words", 3), ("2 Incomp sounds", 2),
        ("1.0 ET/Trach", 1), ("Oriented", 5), ("Confused", 4), ("Inappropriate Words", 3),
        ("Incomprehensible sounds", 2), ("No Response", 1), ("No Response-ETT", 1),
        # other spellings, and what is none
        ("ORIENTED", 5), (" 6 ", 6), ("4.0", 4), ("15", None), ("0", None), ("7", None),
        ("1.5", None), ("sedated", None), ("", None), (None, None),
    ],
)  # fmt: skip
def test_score_of_charted_text(text: str | None, score: int | None) -> None:
    frame = pl.DataFrame({"text": [text]}, schema={"text": pl.String})
    assert frame.select(score_of(pl.col("text"))).item() == score


def test_absent_component_is_carried_for_six_hours_then_taken_as_normal() -> None:
    made = totals(
        components((0, "eye", 1), (0, "verbal", 1), (0, "motor", 1), (6, "eye", 2), (6.5, "eye", 2))
    )
    assert made["hours"].to_list() == [0, 6, 6.5]
    assert made["value"].to_list() == [3, 2 + 1 + 1, 2 + 5 + 6]


def test_total_is_known_when_the_last_of_its_components_is() -> None:
    made = totals(components((0, "eye", 4, 0.5), (0, "verbal", 5, 2), (1, "motor", 6)))
    assert made.select("hours", "available_hours", "value").rows() == [(0, 2, 15), (1, 2, 15)]


def test_twice_charted_component_counts_with_its_last_version() -> None:
    made = totals(components((0, "motor", 5, 1), (0, "motor", 2, 3), (0, "motor", 6, 1)))
    assert made.select("available_hours", "value").rows() == [(3, 4 + 5 + 2)]


@given(charted())
def test_totals_are_scores_at_every_charted_time(rows: pl.DataFrame) -> None:
    made = totals(rows)
    assert made["value"].is_between(3, 15).all()
    assert made["value"].eq(made["value"].round()).all()
    times = rows.drop_nulls("value").select("stay", "hours").unique().sort("stay", "hours")
    assert made.select("stay", "hours").equals(times)
    assert (made["available_hours"] > made["hours"]).fill_null(True).all()


@given(charted(), st.integers(-4, 40).map(lambda n: n / 2))
def test_totals_do_not_depend_on_later_components(rows: pl.DataFrame, hours: float) -> None:
    before = totals(rows.filter(pl.col("hours") <= hours))
    assert before.equals(totals(rows).filter(pl.col("hours") <= hours))


@given(charted(), st.integers(0, 9))
def test_totals_do_not_depend_on_the_order_of_rows(rows: pl.DataFrame, seed: int) -> None:
    assert totals(rows.sample(fraction=1, shuffle=True, seed=seed)).equals(totals(rows))


@given(charted())
def test_agrees_with_the_rule_spelled_out(rows: pl.DataFrame) -> None:
    known = rows.with_columns(known=pl.col("available_hours").fill_null(pl.col("hours")))

    def expected(stay: int, hours: float) -> float:
        total = 0.0
        for name, normal in NORMAL.items():
            usable = [
                (r["hours"], r["known"], r["value"])
                for r in known.drop_nulls("value").iter_rows(named=True)
                if (r["stay"], r["component"]) == (stay, name)
                and hours - CARRIED_HOURS <= r["hours"] <= hours
            ]
            total += max(usable)[2] if usable else normal
        return total

    made = totals(rows)
    for stay, hours, value in made.select("stay", "hours", "value").iter_rows():
        assert value == expected(stay, hours)
