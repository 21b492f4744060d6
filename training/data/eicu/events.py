"""Events in eICU: laboratory results, drug orders, infusions and treatments.

Diagnoses are never events, and neither is whether something was active upon discharge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache

import polars as pl

from training.data.codes import CODES
from training.data.csv_table import CsvTable
from training.data.eicu.drugs import drug_name
from training.data.eicu.files import count_early, hours, known_hours, number, of_cohort, whole
from training.data.eicu.observations import LAB_VARIABLES
from training.data.sources import Tally
from training.data.tables import load

EVENT_COLUMNS = ("stay", "code", "hours", "available_hours", "value")
CODE_COLUMNS = ("code", "descriptor", "unit")

# Laboratory, unit at its interface -> factor of what the laboratory sent to the unit of the table.
# eICU converts some of these wrongly, or not at all.
_FOREIGN_UNITS = {
    ("CRP", "mg/l"): 0.1,
    ("magnesium", "meq/l"): 1.2153,  # half the molar mass, 24.305 g/mol, a tenth of a litre
}
# These are in one of two units, whatever their unit column says; the ranges lie far apart. From
# this value on, a result is in the other unit: reason, laboratory, value, how it is converted.
_TWO_UNITS: Sequence[tuple[str, str, float, Callable[[pl.Expr], pl.Expr]]] = (
    ("mg/dL", "ionized calcium", 2.5, lambda v: v / 4.0078),  # 40.078 g/mol
    ("fahrenheit", "Temperature", 70.0, lambda v: (v - 32) * 5 / 9),
)

_UNKNOWN_UNITS = ("", "unknown")
_UCUM_RATE = r"^(?:mL|L|ug|mg|g|ng|\[iU\]|meq|mmol)(?:/kg)?/(?:min|h|d)$"


def select_labs(rows: pl.DataFrame, stays: pl.DataFrame, tally: Tally) -> pl.DataFrame:
    """Of lab: stay, minutes, revised, labname, unit, interface, value (never null)."""
    text, result = pl.col("labresulttext"), pl.col("labresult")
    interface = pl.col("labmeasurenameinterface").str.to_lowercase()
    factors = pl.DataFrame(
        [(*key, factor) for key, factor in _FOREIGN_UNITS.items()],
        schema={"labname": pl.String, "interface": pl.String, "factor": pl.Float64},
        orient="row",
    )
    found = (
        of_cohort(rows, stays)
        .with_columns(
            interface=interface, sent=number(text), value=pl.coalesce(result, number(text))
        )
        .join(factors, on=["labname", "interface"], how="left", maintain_order="left")
    )
    foreign = pl.col("factor").is_not_null() & pl.col("sent").is_not_null()
    counts = found.select(
        words=pl.col("value").is_null().sum(),
        censored=(
            result.is_null() & pl.col("sent").is_not_null() & text.str.contains("[<>]")
        ).sum(),
        foreign=foreign.sum(),
    ).row(0, named=True)
    if counts["words"]:
        tally.refused["result-in-words:lab"] += counts["words"]
    for reason, key in (
        ("limit-of-assay:lab", "censored"),
        ("unit-of-interface:lab", "foreign"),
    ):
        if counts[key]:
            tally.repaired[reason] += counts[key]
    found = found.with_columns(
        value=pl.when(foreign).then(pl.col("sent") * pl.col("factor")).otherwise("value")
    )
    for reason, laboratory, bound, convert in _TWO_UNITS:
        other = (pl.col("labname") == laboratory) & (pl.col("value") >= bound)
        if n := found.select(other.sum()).item():
            tally.repaired[f"{reason}:{laboratory}"] += n
            value = pl.col("value")
            found = found.with_columns(value=pl.when(other).then(convert(value)).otherwise(value))
    count_early(found, "labresultrevisedoffset", "labresultoffset", "lab", tally)
    return found.drop_nulls("value").select(
        "stay",
        pl.col("labresultoffset").alias("minutes"),
        pl.col("labresultrevisedoffset").alias("revised"),
        "labname",
        # Written with a character reference for the degree sign.
        pl.col("labmeasurenamesystem").str.replace("&#176;", "°", literal=True).alias("unit"),
        "interface",
        "value",
    )


def ingredient_names(medication: CsvTable) -> pl.DataFrame:
    """What each ingredient code (drughiclseqno) is mostly called: drughiclseqno, drug.

    Two orders in five have a code and no name. Read from the whole table: a matter of vocabulary,
    not of patients.
    """
    counted = [
        frame.drop_nulls(["drughiclseqno", "drugname"]).group_by("drughiclseqno", "drugname").len()
        for frame in whole(medication, "names of ingredients")
    ]
    return (
        pl.concat(counted)
        .with_columns(drug=drug_name(pl.col("drugname")))
        .group_by("drughiclseqno", "drug")
        .agg(pl.col("len").sum())
        .sort("drughiclseqno", "len", "drug", descending=[False, True, False])
        .unique("drughiclseqno", keep="first", maintain_order=True)
        .select("drughiclseqno", "drug")
    )


def select_orders(
    rows: pl.DataFrame, stays: pl.DataFrame, names: pl.DataFrame, tally: Tally
) -> pl.DataFrame:
    """Of medication: stay, ordered, start, stop, drug. `names` are `ingredient_names`."""
    found = of_cohort(rows, stays)
    cancelled = (pl.col("drugordercancelled") == "Yes").fill_null(value=False)
    kept = found.filter(~cancelled)
    if len(kept) < len(found):
        tally.refused["cancelled:medication"] += len(found) - len(kept)
    ingredient = pl.format("hicl {}", "drughiclseqno")
    named = _with_drug(kept, "drugname").join(
        names.rename({"drug": "called"}), on="drughiclseqno", how="left", maintain_order="left"
    )
    named = named.with_columns(pl.coalesce("drug", "called", ingredient).alias("drug"))
    nameless = named["drug"].null_count()
    if nameless:
        tally.refused["no-name:medication"] += nameless
    return named.drop_nulls("drug").select(
        "stay",
        pl.col("drugorderoffset").alias("ordered"),
        pl.col("drugstartoffset").alias("start"),
        pl.col("drugstopoffset").alias("stop"),
        "drug",
    )


def select_infusions(rows: pl.DataFrame, stays: pl.DataFrame, tally: Tally) -> pl.DataFrame:
    """Of infusionDrug: stay, minutes, drug, unit (as written, null: none), rate."""
    last_brackets = r"\(([^()]*)\)\s*$"
    name = pl.col("drugname")
    unit = name.str.extract(last_brackets).str.strip_chars().str.to_lowercase()
    found = of_cohort(rows.drop_nulls("drugname"), stays).with_columns(
        unit=pl.when(~unit.is_in(_UNKNOWN_UNITS)).then(unit),
        rate=number(pl.col("drugrate")),
        drugname=name.str.replace(last_brackets, ""),
    )
    for reason, column in (("no-unit", "unit"), ("no-rate", "rate")):
        if n := found[column].null_count():
            tally.repaired[f"{reason}:infusionDrug"] += n
    return (
        _with_drug(found, "drugname")
        .drop_nulls("drug")
        .select("stay", pl.col("infusionoffset").alias("minutes"), "drug", "unit", "rate")
    )


def select_treatments(rows: pl.DataFrame, stays: pl.DataFrame, tally: Tally) -> pl.DataFrame:
    """Of treatment: stay, minutes, treatment (the last element of its path)."""
    return of_cohort(rows.drop_nulls("treatmentstring"), stays).select(
        "stay",
        pl.col("treatmentoffset").alias("minutes"),
        pl.col("treatmentstring").str.split("|").list.last().str.strip_chars().alias("treatment"),
    )


def events(items: Mapping[str, pl.DataFrame], tally: Tally) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Events and codes of a block of stays from what was kept of each table."""
    makers: Mapping[str, Callable[[pl.DataFrame, Tally], pl.DataFrame]] = {
        "lab": _of_labs,
        "medication": _of_orders,
        "infusionDrug": _of_infusions,
        "treatment": _of_treatments,
    }
    columns = (*EVENT_COLUMNS, "descriptor", "unit")
    made = [
        make(items[name], tally).select(columns) for name, make in makers.items() if name in items
    ]
    if not made:
        empty = pl.DataFrame(schema=dict.fromkeys(columns, pl.String))
        return empty.select(EVENT_COLUMNS), empty.select(CODE_COLUMNS)
    found = pl.concat(made)
    codes = found.select(CODE_COLUMNS).unique("code").sort("code")
    return found.select(EVENT_COLUMNS), codes


@cache
def lab_codes() -> pl.DataFrame:
    """labname, labmeasurenamesystem (the usual unit, as eICU writes it), code, descriptor, unit."""
    known = pl.DataFrame(
        [(code, info.descriptor, info.unit) for code, info in CODES.items()],
        schema={"code": pl.String, "shared": pl.String, "shared_unit": pl.String},
        orient="row",
    )
    return (
        load("eicu_labs")
        .join(known, on="code", how="left", maintain_order="left")
        .with_columns(
            descriptor=pl.coalesce("shared", "descriptor"), unit=pl.coalesce("shared_unit", "unit")
        )
        .drop("shared", "shared_unit")
    )


def _of_labs(labs: pl.DataFrame, tally: Tally) -> pl.DataFrame:
    found = labs.filter(~pl.col("labname").is_in(LAB_VARIABLES)).join(
        lab_codes().rename({"unit": "ucum"}), on="labname", how="left", maintain_order="left"
    )
    known = pl.col("code").is_not_null()
    own = pl.coalesce("code", pl.format("EICU/LAB/{}", "labname"))
    other_unit = pl.col("unit").is_not_null() & (
        ~known | pl.col("unit").ne_missing(pl.col("labmeasurenamesystem"))
    )
    return found.select(
        "stay",
        hours("minutes").alias("hours"),
        known_hours("revised", "minutes").alias("available_hours"),
        "value",
        code=pl.when(other_unit).then(pl.format("{}//{}", own, "unit")).otherwise(own),
        descriptor=pl.coalesce("descriptor", pl.col("labname").str.to_lowercase()),
        unit=pl.when(~other_unit).then("ucum"),
    )


def _of_orders(orders: pl.DataFrame, tally: Tally) -> pl.DataFrame:
    # A stop of 0, or not after the start, says that none was recorded.
    stopped = orders.filter(pl.col("stop") > pl.col("start"))
    if len(stopped) < len(orders):
        tally.repaired["no-stop:medication"] += len(orders) - len(stopped)

    def made(frame: pl.DataFrame, minutes: str, code: str, words: str) -> pl.DataFrame:
        return frame.select(
            "stay",
            hours(minutes).alias("hours"),
            known_hours("ordered", minutes).alias("available_hours"),
            value=pl.lit(None, pl.Float64),
            code=pl.format(f"EICU/{code}/{{}}", "drug"),
            descriptor=pl.format(f"{words} {{}}", "drug"),
            unit=pl.lit(None, pl.String),
        )

    return pl.concat(
        [
            made(orders, "start", "ORDER", "order of"),
            made(stopped, "stop", "ORDER_END", "end of the order of"),
        ]
    )


def _of_infusions(infusions: pl.DataFrame, tally: Tally) -> pl.DataFrame:
    unit = pl.col("unit")
    ucum = (
        unit.str.replace("mcg", "ug")
        .str.replace("^ml", "mL")
        .str.replace("units?", "[iU]")
        .str.replace("/hr$", "/h")
        .str.replace("/day$", "/d")
    )
    return infusions.select(
        "stay",
        hours("minutes").alias("hours"),
        pl.lit(None, pl.Float64).alias("available_hours"),
        # A rate without a unit is no number: a code has one unit.
        value=pl.when(unit.is_not_null()).then("rate"),
        code=pl.concat_str(
            [pl.format("EICU/INFUSION/{}", "drug"), pl.format("//{}", "unit").fill_null("")]
        ),
        descriptor=pl.format("infusion of {}", "drug"),
        unit=pl.when(ucum.str.contains(_UCUM_RATE)).then(ucum),
    )


def _of_treatments(treatments: pl.DataFrame, tally: Tally) -> pl.DataFrame:
    return treatments.select(
        "stay",
        hours("minutes").alias("hours"),
        pl.lit(None, pl.Float64).alias("available_hours"),
        value=pl.lit(None, pl.Float64),
        code=pl.format("EICU/TREATMENT/{}", "treatment"),
        descriptor=pl.col("treatment").str.to_lowercase(),
        unit=pl.lit(None, pl.String),
    )


def _with_drug(rows: pl.DataFrame, column: str) -> pl.DataFrame:
    """The rows with `drug`, the name in `column` made plain. Names repeat: each is done once."""
    names = rows.select(pl.col(column).drop_nulls().unique())
    plain = names.with_columns(drug=drug_name(pl.col(column)))
    return rows.join(plain, on=column, how="left", maintain_order="left")
