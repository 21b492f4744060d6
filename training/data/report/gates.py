"""Quality gates: what an extraction must not look like. A store that fails one is not to be used.

A gate is a function that reads the report of a store (`build`) and what was expected
of its source, and yields findings. Most findings fail the gate; a few only warn. A finding is a
sentence, without its full stop, that names a variable, a label or a number of patients, never a
patient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llm4ehr.store_tables import INFO_FILE, StoreInfo

if TYPE_CHECKING:
    from training.data.extraction import Expected

UNREADABLE_SHARE = 0.01
"""Share of rows that may be unreadable."""

PHENOTYPE_STAYS = 100
"""In fewer stays than this, a phenotype that nobody has is no surprise: the rarest of the 25 is
found in 4 % of the stays of MIMIC-III."""

# Reasons begin so. An "untimed" item has no time, or none that could be read.
_UNREADABLE = (
    "unreadable",
    "malformed",
    "untimed",
    "not-a-number",
    "unknown-unit",
    "unit-unclear",
)
_DIGEST_CHARACTERS = 12


class Finding(NamedTuple):
    """What a gate found, and whether that fails it."""

    sentence: str
    fails: bool = True


def judge(report: Mapping[str, Any], store: Path, expected: Expected) -> list[dict[str, Any]]:
    """The result of every gate: name, passed, failures and warnings (sentences).

    Raises ValueError if the report is of another store.
    """
    info = StoreInfo.from_json((store / INFO_FILE).read_text(encoding="utf-8"))
    if report["description"]["digests"] != short_digests(info.digests):
        raise ValueError(f"{store}: the report is of another store")
    results = []
    for name, gate in GATES.items():
        findings = list(gate(report, expected))
        results.append(
            {
                "name": name,
                "passed": not any(f.fails for f in findings),
                "failures": [f.sentence for f in findings if f.fails],
                "warnings": [f.sentence for f in findings if not f.fails],
            }
        )
    return results


def check(report: Mapping[str, Any], store: Path, expected: Expected) -> list[str]:
    """Why this store must not be used, one sentence for each finding; empty: it is sound."""
    return [s for result in judge(report, store, expected) for s in result["failures"]]


def is_unreadable(reason: str) -> bool:
    """Whether rows are refused for this reason because the source could not be read.

    Other reasons are rules: limits, duplicates, items outside the stay, choices of a reader.
    """
    return reason.startswith(_UNREADABLE)


def short_digests(digests: Mapping[str, str]) -> dict[str, str]:
    """Digests as a report shows them."""
    return {name: digest[:_DIGEST_CHARACTERS] for name, digest in sorted(digests.items())}


def every_variable_observed(report: Mapping[str, Any], expected: Expected) -> Iterator[Finding]:
    """A variable that the source has is observed at some hour of some stay."""
    for variable in report["variables"]:
        name = variable["name"]
        if variable["hours_observed"] == 0 and name not in expected.absent_variables:
            yield Finding(f"The variable {name} is not observed at any hour of any stay")
        if variable["hours_observed"] and name in expected.absent_variables:
            yield Finding(f"The variable {name} is observed, though the source has none", False)


def every_task_labelled(report: Mapping[str, Any], expected: Expected) -> Iterator[Finding]:
    """A labelled task has both classes."""
    outcomes, instances = report["labels"]["outcomes"], report["labels"]["instances"]["all"]
    for task in sorted(expected.tasks):
        if task == "mortality":
            yield from _two_classes(task, "stay", outcomes["died"], outcomes["survived"])
        elif task == "decompensation":
            positive = instances["decompensation_positive"]
            yield from _two_classes(task, "hour", positive, instances["decompensation_negative"])
        elif task == "remaining_los":
            if outcomes["los_known"] == 0:
                yield Finding("remaining_los: no stay has a length of stay")
        elif task == "phenotyping":
            yield from _phenotypes(report)
        else:
            yield Finding(f"The task {task} is expected, but stores have no such label")


def _two_classes(task: str, unit: str, positive: int, negative: int) -> Iterator[Finding]:
    if positive + negative == 0:
        yield Finding(f"{task}: no {unit} has a label")
    elif positive == 0 or negative == 0:
        only = "negative" if positive == 0 else "positive"
        yield Finding(f"{task}: all {positive + negative:,} labelled {unit}s are {only}")


def _phenotypes(report: Mapping[str, Any]) -> Iterator[Finding]:
    stays = report["labels"]["instances"]["all"]["phenotyping_stays"]
    if stays == 0:
        yield Finding("phenotyping: no stay has phenotypes")
        return
    for phenotype in report["labels"]["phenotypes"]:
        if phenotype["stays"] in (0, stays):
            owners = "none" if phenotype["stays"] == 0 else "all"
            yield Finding(
                f"phenotyping: {owners} of {stays:,} stays have “{phenotype['name']}”",
                fails=stays >= PHENOTYPE_STAYS,
            )


def one_split_per_patient(report: Mapping[str, Any], expected: Expected) -> Iterator[Finding]:
    """All stays of a patient lie in one split."""
    for column, patients in report["splits"]["overlap"].items():
        if patients:
            stays = f"{_count(patients, 'patient')} with stays"
            yield Finding(f"{stays} in more than one {column.replace('_', ' ')}")


def nothing_before_birth(report: Mapping[str, Any], expected: Expected) -> Iterator[Finding]:
    """No item lies before the birth of its patient."""
    yield from _faults(report, "before-birth", "before the birth of the patient")


def known_after_true(report: Mapping[str, Any], expected: Expected) -> Iterator[Finding]:
    """Nothing is available before it is true."""
    yield from _faults(report, "known-before-true", "available before the time of the value")


def nothing_outside_stay(report: Mapping[str, Any], expected: Expected) -> Iterator[Finding]:
    """Every item lies between admission and the end of the record."""
    yield from _faults(report, "before-admission", "before admission")
    yield from _faults(report, "after-end", "after the last hour of the record")


def _faults(report: Mapping[str, Any], fault: str, where: str) -> Iterator[Finding]:
    for found in report["faults"]:
        if found["fault"] == fault:
            rows = _count(found["rows"], "event" if found["item"] == "event" else "observation")
            of = "" if found["item"] == "event" else f" of {found['item']}"
            yield Finding(f"{rows}{of} {where}, in {_count(found['patients'], 'patient')}")


def source_readable(report: Mapping[str, Any], expected: Expected) -> Iterator[Finding]:
    """At most 1 % of the rows of the source could not be read."""
    refused = report["refused"]
    unreadable = [r for r in refused["reasons"] if is_unreadable(r["reason"])]
    rows, seen = sum(r["rows"] for r in unreadable), refused["rows_seen"]
    if rows > UNREADABLE_SHARE * seen:
        reasons = ", ".join(f"{r['reason']} {r['rows']:,}" for r in unreadable)
        yield Finding(
            f"{rows:,} of {seen:,} rows ({_percent(rows, seen)}) could not be read: {reasons}"
        )
    # A variable can be lost without being many rows of the whole.
    for variable in report["variables"]:
        name = variable["name"]
        details = [d for r in unreadable for d in r["details"] if d["name"].casefold() == name]
        lost = sum(d["rows"] for d in details)
        usable = variable["values"] + lost
        if lost > UNREADABLE_SHARE * usable:
            share = _percent(lost, usable)
            yield Finding(f"{lost:,} rows of {name} ({share}) could not be read", fails=False)


def published_figures_known(report: Mapping[str, Any], expected: Expected) -> Iterator[Finding]:
    """Every published figure is compared with one of the report."""
    for row in report["published"]:
        if row["ours"] is None:
            yield Finding(f"The report has no figure for the published {row['figure']}", False)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


GATES: Mapping[str, Callable[[Mapping[str, Any], Expected], Iterator[Finding]]] = {
    "every variable is observed": every_variable_observed,
    "every task has both classes": every_task_labelled,
    "a patient is in one split": one_split_per_patient,
    "nothing lies before birth": nothing_before_birth,
    "nothing is known before it is true": known_after_true,
    "nothing lies outside the stay": nothing_outside_stay,
    "the source can be read": source_readable,
    "published figures are compared": published_figures_known,
}
"""Name of each gate, as a report shows it, and the gate."""
