"""Loaded models may count an event in other units, or not know it: the log is the same for all."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from llm4ehr.vocabulary import CodeEntry, Vocabulary
from service.core import Draft, episode_at
from service.ingest import Batch, Known, Rules, Validator
from service.projection import model_episode
from tests.service.fakes import T0, at, creatinine, entries, stamp

RULES = Rules(
    vocabulary=Vocabulary([CodeEntry(code="LOINC/2160-0", descriptor="c", unit="mg/dL", n=1)]),
    future_tolerance=timedelta(minutes=5),
    allowed_lateness=timedelta(hours=2),
)
MASS = RULES.vocabulary
VOLUME = Vocabulary([CodeEntry(code="LOINC/2160-0", descriptor="c", unit="mL", n=1)])
NOTHING = Vocabulary([CodeEntry(code="LOINC/2951-2", descriptor="sodium", unit="mmol/L", n=1)])


def judged(rules: Rules, unit: str) -> Validator:
    known = Known(admitted_at=T0, discharged_at=None, seq=1, by_id={}, by_content={})
    validator = Validator(known, rules, at(10))
    validator.check(Batch(events=[creatinine(5.0, 1.5, unit=unit)]))
    return validator


@pytest.mark.parametrize(
    ("active", "others", "unit", "outcome"),
    [
        (MASS, (), "mg/dL", ()),
        (MASS, (), "mL", "unit-not-convertible"),
        (MASS, (NOTHING,), "mL", "unit-not-convertible"),
        (MASS, (NOTHING, VOLUME), "mL", ("value-not-read",)),
        (MASS, (VOLUME,), "furlong", "unit-unknown"),
        (VOLUME, (MASS,), "mg/dL", ("value-not-read",)),
        (NOTHING, (MASS,), "furlong", ("not-in-vocabulary",)),
    ],
)
def test_an_event_is_refused_only_if_no_loaded_model_reads_its_unit(
    active: Vocabulary, others: tuple[Vocabulary, ...], unit: str, outcome: str | tuple[str, ...]
) -> None:
    validator = judged(replace(RULES, vocabulary=active, others=others), unit)
    [result] = validator.results
    if isinstance(outcome, str):
        assert result.error is not None
        assert result.error.type == outcome
        assert validator.drafts == []
    else:
        assert (result.status, result.flags) == ("accepted", outcome)
        [draft] = validator.drafts
        assert (draft.payload["value"], draft.payload["unit"]) == (5.0, unit)


def test_each_model_reads_what_it_can() -> None:
    [draft] = judged(replace(RULES, others=(VOLUME,)), "mL").drafts
    admission = Draft(kind="admission", payload={"admitted_at": stamp(0), "statics": {}})
    view = episode_at(entries(admission, draft))
    values = [model_episode(view, v).ev_value.tolist() for v in (MASS, VOLUME)]
    assert str(values) == "[[nan], [5.0]]"
