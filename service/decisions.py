"""What a request changes: pure functions from the state of an episode to drafts for the log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

from llm4ehr.episode import Statics
from service.core import Draft, EpisodeView
from service.ingest import Batch, ItemResult, Known, Rules, Validator
from service.state import EpisodeState
from service.times import format_time


class UnknownEpisode(Exception):
    """No such episode, or none yet at the time asked about."""


class DeletedEpisode(Exception):
    """The episode was deleted."""


class Refused(Exception):
    """A fact about the stay itself cannot be true. `path` names the field."""

    def __init__(self, path: str, type_: str, detail: str) -> None:
        super().__init__(detail)
        self.path = path
        self.type = type_
        self.detail = detail


class NothingAccepted(Exception):
    """Every item of a request was refused, so nothing of it was recorded."""

    def __init__(self, results: Sequence[ItemResult]) -> None:
        super().__init__("every item was refused")
        self.results = tuple(results)


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """When a stay began, and what was known of the patient."""

    admitted_at: datetime
    statics: Statics = field(default_factory=Statics)

    def payload(self) -> dict[str, Any]:
        statics = {k: v for k, v in asdict(self.statics).items() if v is not None}
        return {"admitted_at": format_time(self.admitted_at), "statics": statics}


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A partial change of a stay: only what is given changes."""

    admitted_at: datetime | None = None
    statics: Mapping[str, Any] = field(default_factory=dict)
    """Static facts by name; None takes one back."""
    discharge: bool = False
    discharged_at: datetime | None = None
    """With `discharge`: the time, or None to take a discharge back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Posted:
    """Outcome of a batch. `admission` says what became of the admission sent with it, if any:
    "created", "unchanged", or "differs" from the one on record, which stands.
    """

    results: tuple[ItemResult, ...]
    targets_known: tuple[bool | None, ...]
    admission: str | None


def existing(state: EpisodeState | None) -> EpisodeView:
    """The view of an episode that can be written to. Raises UnknownEpisode, DeletedEpisode."""
    if state is None:
        raise UnknownEpisode
    if state.view.deleted:
        raise DeletedEpisode
    return state.view


def post(
    state: EpisodeState | None,
    now: datetime,
    rules: Rules,
    batch: Batch,
    admission: Admission | None,
) -> tuple[list[Draft], Posted]:
    """Record the good items of a batch.

    An admission creates the episode and never moves a known one: a batch may be sent again long
    after the admission was corrected. Raises UnknownEpisode, DeletedEpisode, Refused,
    NothingAccepted.
    """
    drafts: list[Draft] = []
    outcome: str | None = None
    if state is None and admission is not None:
        _check_admission(admission.admitted_at, None, rules, now)
        drafts.append(Draft(kind="admission", payload=admission.payload()))
        outcome = "created"
        known = Known(
            admitted_at=admission.admitted_at, discharged_at=None, seq=1, by_id={}, by_content={}
        )
    else:
        view = existing(state)
        assert state is not None
        if admission is not None:
            same = admission == Admission(admitted_at=view.admitted_at, statics=view.statics)
            outcome = "unchanged" if same else "differs"
        known = Known(
            admitted_at=view.admitted_at,
            discharged_at=view.discharged_at,
            seq=state.seq,
            by_id=state.by_id,
            by_content=state.by_content,
        )
    validator = Validator(known, rules, now)
    validator.check(batch)
    results = tuple(validator.results)
    if results and all(result.status == "rejected" for result in results):
        raise NothingAccepted(results)
    posted = Posted(
        results=results,
        targets_known=tuple(validator.target_known(result) for result in results),
        admission=outcome,
    )
    return drafts + validator.drafts, posted


def put(
    state: EpisodeState | None, now: datetime, rules: Rules, admission: Admission
) -> tuple[list[Draft], bool]:
    """Set the admission; True if that creates the episode. Raises DeletedEpisode, Refused."""
    if state is None:
        _check_admission(admission.admitted_at, None, rules, now)
        return [Draft(kind="admission", payload=admission.payload())], True
    view = existing(state)
    _check_admission(admission.admitted_at, view.discharged_at, rules, now)
    return _readmit(view, admission), False


def patch(
    state: EpisodeState | None, now: datetime, rules: Rules, change: Change
) -> tuple[list[Draft], None]:
    """Change admission, static facts or discharge.

    Raises UnknownEpisode, DeletedEpisode, Refused.
    """
    view = existing(state)
    admission = Admission(
        admitted_at=change.admitted_at or view.admitted_at,
        statics=Statics(**asdict(view.statics) | dict(change.statics)),
    )
    discharged_at = change.discharged_at if change.discharge else view.discharged_at
    if change.discharge and discharged_at is not None:
        if discharged_at > now + rules.future_tolerance:
            raise Refused("/discharged_at", "in-the-future", "the discharge lies in the future")
        if discharged_at < admission.admitted_at:
            raise Refused(
                "/discharged_at", "before-admission", "the discharge lies before the admission"
            )
    if change.admitted_at is not None:
        _check_admission(admission.admitted_at, discharged_at, rules, now)
    drafts = _readmit(view, admission)
    if discharged_at != view.discharged_at:
        at = None if discharged_at is None else format_time(discharged_at)
        drafts.append(Draft(kind="discharge", payload={"discharged_at": at}))
    return drafts, None


def delete(state: EpisodeState | None) -> tuple[list[Draft], None]:
    """Mark as deleted; doing so again changes nothing. Raises UnknownEpisode."""
    if state is None:
        raise UnknownEpisode
    return [] if state.view.deleted else [Draft(kind="deletion")], None


def _check_admission(
    admitted_at: datetime, discharged_at: datetime | None, rules: Rules, now: datetime
) -> None:
    if admitted_at > now + rules.future_tolerance:
        raise Refused("/admitted_at", "in-the-future", "the admission lies in the future")
    if discharged_at is not None and admitted_at > discharged_at:
        raise Refused("/admitted_at", "after-discharge", "the admission lies after the discharge")


def _readmit(view: EpisodeView, admission: Admission) -> list[Draft]:
    """An admission entry, unless it would say what is on record."""
    if admission == Admission(admitted_at=view.admitted_at, statics=view.statics):
        return []
    return [Draft(kind="admission", payload=admission.payload())]
