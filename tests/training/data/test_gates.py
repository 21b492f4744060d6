"""Every quality gate stops what it is there for, and lets a sound store pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm4ehr.variables import VARIABLES
from tests.training.data.report_store import died, stay, write_store
from training.data.extraction import Expected
from training.data.phenotypes import PHENOTYPES
from training.data.report.build import build_report
from training.data.report.gates import GATES, check, is_unreadable, judge

TASKS = frozenset({"mortality", "decompensation", "remaining_los", "phenotyping"})
EXPECTED = Expected(tasks=TASKS)

STAYS = [
    stay("1", los_hours=10.0, age_years=40.0, phenotypes=list(PHENOTYPES), **died(8.0)),
    stay("2", los_hours=9.5, age_years=0.001, phenotypes=[], mortality=False),
    stay("3", los_hours=9.0, subject_id="p-2", mortality=False),
]
OBSERVATIONS = [(s["episode_id"], v.name, 0.0, 0.5, v.normal) for s in STAYS for v in VARIABLES]
EVENTS = [("1", "X/start", 10.0, None, None), ("2", "X/start", 1.0, 10.0, None)]


def _judge(
    folder: Path,
    *,
    stays: list[dict[str, Any]] = STAYS,
    observations: list[tuple[Any, ...]] = OBSERVATIONS,
    events: list[tuple[Any, ...]] = EVENTS,
    refused: dict[str, int] | None = None,
    expected: Expected = EXPECTED,
) -> tuple[list[str], list[str]]:
    """Failures and warnings of a store of these rows; failures agree everywhere."""
    store = write_store(folder / "store", stays, observations, events, refused=refused)
    report = build_report(store, (), expected)
    failures = check(report, store, expected)
    assert not any(s.endswith(".") for s in failures)  # `prepare` joins them
    assert failures == [s for gate in report["gates"] for s in gate["failures"]]
    assert report["gates"] == judge(report, store, expected)
    for gate in report["gates"]:
        assert gate["passed"] == (not gate["failures"])
    return failures, [s for gate in report["gates"] for s in gate["warnings"]]


def _changed(index: int, **changes: Any) -> list[dict[str, Any]]:
    return [row | changes if i == index else row for i, row in enumerate(STAYS)]


def test_a_sound_store_passes(tmp_path: Path) -> None:
    """Also with an item at the very end of the record, and one known as it comes."""
    assert _judge(tmp_path) == ([], [])


def test_a_variable_without_a_value_fails(tmp_path: Path) -> None:
    without = [o for o in OBSERVATIONS if o[1] != "gcs_total"]
    failures, _ = _judge(tmp_path, observations=without)
    assert failures == ["The variable gcs_total is not observed at any hour of any stay"]


def test_a_variable_that_the_source_lacks_may_be_absent(tmp_path: Path) -> None:
    expected = Expected(absent_variables=frozenset({"gcs_total", "hr"}))
    without = [o for o in OBSERVATIONS if o[1] != "gcs_total"]
    failures, warnings = _judge(tmp_path, observations=without, expected=expected)
    assert failures == []
    assert warnings == ["The variable hr is observed, though the source has none"]


def test_a_variable_only_after_the_record_fails(tmp_path: Path) -> None:
    late = [o if o[1] != "ph" else (o[0], "ph", 0.0, 10.0, 7.4) for o in OBSERVATIONS]
    failures, _ = _judge(tmp_path, observations=late)
    assert failures == ["The variable ph is not observed at any hour of any stay"]


@pytest.mark.parametrize(
    ("index", "changes", "sentences"),
    [
        (
            0,
            {"mortality": False, "death_hours_low": None, "death_hours_high": None},
            [
                # Sample times 5 to 10, 5 to 9 and 5 to 9.
                "decompensation: all 16 labelled hours are negative",
                "mortality: all 3 labelled stays are negative",
            ],
        ),
        # Dead after a day: mortality has both classes, but no hour is within 24 hours of death.
        (0, died(40.0), ["decompensation: all 16 labelled hours are negative"]),
    ],
)
def test_a_label_of_one_class_fails(
    tmp_path: Path, index: int, changes: dict[str, Any], sentences: list[str]
) -> None:
    assert _judge(tmp_path, stays=_changed(index, **changes))[0] == sentences


def test_all_dead_fails(tmp_path: Path) -> None:
    rows = [row | died(8.0) for row in STAYS]
    assert _judge(tmp_path, stays=rows)[0] == [
        "decompensation: all 12 labelled hours are positive",
        "mortality: all 3 labelled stays are positive",
    ]


def test_labels_that_are_all_null_fail(tmp_path: Path) -> None:
    no_label = dict.fromkeys(
        ("mortality", "los_hours", "death_hours_low", "death_hours_high", "phenotypes")
    )
    rows = [row | no_label for row in STAYS]
    assert _judge(tmp_path, stays=rows)[0] == [
        "decompensation: no hour has a label",
        "mortality: no stay has a label",
        "phenotyping: no stay has phenotypes",
        "remaining_los: no stay has a length of stay",
    ]
    assert _judge(tmp_path / "not-expected", stays=rows, expected=Expected()) == ([], [])


def test_a_task_that_stores_do_not_label_fails(tmp_path: Path) -> None:
    expected = Expected(tasks=frozenset({"sepsis"}))
    assert _judge(tmp_path, expected=expected)[0] == [
        "The task sepsis is expected, but stores have no such label"
    ]


@pytest.mark.parametrize(("coded", "fails"), [(99, False), (100, True)])
def test_a_phenotype_that_nobody_has(tmp_path: Path, coded: int, fails: bool) -> None:
    """It warns in fewer than 100 stays and fails from there on; so does one that all have."""
    rows = [
        stay(f"{i:03d}", phenotypes=["Shock", *PHENOTYPES[1:-1]] if i else PHENOTYPES[1:])
        for i in range(coded)
    ]
    rows[1]["phenotypes"] = ["Shock"]
    expected = Expected(
        tasks=frozenset({"phenotyping"}), absent_variables=frozenset(v.name for v in VARIABLES)
    )
    failures, warnings = _judge(tmp_path, stays=rows, observations=[], events=[], expected=expected)
    found = [
        f"phenotyping: none of {coded} stays have “{PHENOTYPES[0]}”",
        f"phenotyping: all of {coded} stays have “Shock”",
    ]
    assert (failures, warnings) == ((found, []) if fails else ([], found))


@pytest.mark.parametrize("column", ["split", "benchmark_split"])
def test_a_patient_in_two_splits_fails(tmp_path: Path, column: str) -> None:
    rows = [row | {column: "train"} for row in STAYS]
    rows[2] |= {column: "test"}
    expected = [f"1 patient with stays in more than one {column.replace('_', ' ')}"]
    assert _judge(tmp_path, stays=rows)[0] == expected


def test_a_stay_outside_the_benchmark_is_in_no_split_of_it(tmp_path: Path) -> None:
    assert _judge(tmp_path, stays=_changed(1, benchmark_split="test"))[0] == []


def test_an_item_before_birth_fails(tmp_path: Path) -> None:
    """The patient of stay 2 is 0.001 years old, 8.8 hours."""
    items = [("2", "hr", -8.7, None, 80.0), ("2", "hr", -8.8, None, 80.0)]
    failures, _ = _judge(
        tmp_path, observations=OBSERVATIONS + items, events=[*EVENTS, ("2", "X/start", -9, 1, None)]
    )
    assert failures == [
        "1 event before the birth of the patient, in 1 patient",
        "1 observation of hr before the birth of the patient, in 1 patient",
        "1 event before admission, in 1 patient",
        "2 observations of hr before admission, in 1 patient",
    ]


def test_the_birth_of_a_patient_of_unknown_age_is_not_judged(tmp_path: Path) -> None:
    failures, _ = _judge(
        tmp_path,
        stays=_changed(1, age_years=None),
        events=[*EVENTS, ("2", "X/start", -9.0, 1.0, None)],
    )
    assert failures == ["1 event before admission, in 1 patient"]


def test_a_value_known_before_its_time_fails(tmp_path: Path) -> None:
    items = [("1", "hr", 5.0, 4.9, 80.0), ("2", "hr", 5.0, 4.0, 80.0), ("3", "hr", 5.0, 5.0, 80.0)]
    events = [*EVENTS, ("1", "X/start", 5.0, 4.0, None)]
    failures, _ = _judge(tmp_path, observations=OBSERVATIONS + items, events=events)
    assert failures == [
        "1 event available before the time of the value, in 1 patient",
        "2 observations of hr available before the time of the value, in 2 patients",
    ]


def test_an_item_after_the_record_fails(tmp_path: Path) -> None:
    """By the time it was true, or by the time it was known; 10.0 is the end of the last hour."""
    items = [("1", "hr", 10.1, None, 80.0), ("2", "ph", 5.0, 10.1, 7.4), ("3", "hr", 10, 10, 80.0)]
    failures, _ = _judge(tmp_path, observations=OBSERVATIONS + items)
    assert failures == [
        "1 observation of hr after the last hour of the record, in 1 patient",
        "1 observation of ph after the last hour of the record, in 1 patient",
    ]


def test_unreadable_rows_fail_above_one_percent(tmp_path: Path) -> None:
    n_items = len(OBSERVATIONS) + len(EVENTS)
    # 8 unreadable rows of 800, and of 799.
    for rows, fails in ((792 - n_items, False), (791 - n_items, True)):
        refused = {"unreadable-time:labevents": 5, "not-a-number:lab": 3, "outside-limits:hr": rows}
        failures, _ = _judge(tmp_path / str(rows), refused=refused)
        assert bool(failures) == fails
    assert failures == [
        "8 of 799 rows (1.0 %) could not be read: unreadable-time 5, not-a-number 3"
    ]


def test_rules_refuse_as_much_as_they_must(tmp_path: Path) -> None:
    assert _judge(tmp_path, refused={"outside-limits:hr": 10**6, "duplicate:event": 10**6})[0] == []


def test_an_unreadable_variable_warns_where_it_is_few_of_all_rows(tmp_path: Path) -> None:
    refused = {"not-a-number:hr": 3, "duplicate:event": 10_000}
    assert _judge(tmp_path, refused=refused) == ([], ["3 rows of hr (50.0 %) could not be read"])


@pytest.mark.parametrize(
    ("reason", "unreadable"),
    [
        ("unreadable-time", True),
        ("not-a-number", True),
        ("untimed", True),
        ("unit-unclear", True),
        ("outside-limits", False),
        ("no-value", False),
        ("after-end", False),
        ("number", False),
    ],
)
def test_reasons_that_mean_an_unreadable_source(reason: str, unreadable: bool) -> None:
    assert is_unreadable(reason) == unreadable


def test_a_published_figure_without_ours_warns(tmp_path: Path) -> None:
    expected = Expected(published={"stays": 3.0, "mean.pulse": 80.0})
    assert _judge(tmp_path, expected=expected) == (
        [],
        ["The report has no figure for the published mean.pulse"],
    )


def test_a_report_of_another_store_is_no_evidence(tmp_path: Path) -> None:
    one = write_store(tmp_path / "one", STAYS, OBSERVATIONS, EVENTS)
    other = write_store(tmp_path / "other", STAYS, OBSERVATIONS, EVENTS[:1])
    report = build_report(one, (), EXPECTED)
    assert check(report, one, EXPECTED) == []
    with pytest.raises(ValueError, match="the report is of another store"):
        check(report, other, EXPECTED)


def test_every_gate_is_named_in_the_report(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", STAYS, OBSERVATIONS, EVENTS)
    report = build_report(store, (), EXPECTED)
    assert [gate["name"] for gate in report["gates"]] == list(GATES)
