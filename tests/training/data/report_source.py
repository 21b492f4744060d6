"""A small store whose report is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.training.data.report_store import died, stay, write_store
from training.data.extraction import Expected, Step

STAYS = [
    # Sample times 5..8: the ninth and tenth hour come after the death.
    stay("1", subject_id="p", split="a", los_hours=10.0, sex="male", age_years=40.0, **died(8.0))
    | {"phenotypes": ["Shock"]},
    # Sample times 7..10: the first observation became known at 6.5.
    stay("2", subject_id="q", split="b", los_hours=30.5, mortality=False, phenotypes=[]),
    # Without an observation there is no sample time.
    stay("3", subject_id="q", split="b", n_hours=60, los_hours=60.0, mortality=False),
]


OBSERVATIONS = [
    ("1", "hr", 0.2, None, 80.0),
    ("1", "hr", 0.9, None, 90.0),  # hour 0 has 90, its last value
    ("1", "hr", 1.5, 2.5, 100.0),  # taken in hour 1, known in hour 2
    ("1", "sbp", 0.5, None, 120.0, 0),
    ("1", "sbp", 0.6, None, 300.5, 1),  # not plausible; the preferred source goes first
    ("2", "hr", 6.1, 6.5, 15.0),  # not plausible
]


EVENTS = [
    ("1", "LOINC/2160-0", 1.0, 3.0, 1.0),
    ("2", "LOINC/2160-0", 1.0, 2.0, 2.0),
    ("2", "LOINC/2160-0", 3.0, None, 4.0),
    ("1", "X/start", 2.0, None, None),
]


REFUSED = {"outside-limits:hr": 3, "not-a-number:hr": 1, "outside-limits:sbp": 1}


WATERFALL = (Step("all", 6, 4, 60), Step("adults", 3, 2, 40))


EXPECTED = Expected(
    published={"stays": 30, "mortality.positive": 20, "observed.hr": 0.025, "mean.hr": 136.6667}
)


def _variable(report: dict[str, Any], name: str) -> dict[str, Any]:
    return next(v for v in report["variables"] if v["name"] == name)


def known_store(tmp_path: Path) -> Path:
    """Three stays in two row groups."""
    return write_store(
        tmp_path / "store", STAYS, OBSERVATIONS, EVENTS,
        refused=REFUSED, repaired={"fahrenheit:temp": 2}, options={"profile": "strict"},
    )  # fmt: skip
