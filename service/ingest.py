"""Validation of what one request says about an episode: raw JSON in, drafts and results out.

Every item is judged alone. A bad one is refused by name and the good ones beside it are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal

from llm4ehr.episode import MAX_HOURS
from llm4ehr.variables import (
    CodeError,
    UnitError,
    convert,
    plausibility_flag,
    resolve_code,
    resolve_name,
    within_limits,
)
from service.entries import Draft, Entry
from service.items import (
    ItemError,
    Said,
    own_id_of,
    read_event,
    read_observation,
    read_withdrawal,
)
from service.units import EventVocabulary, convert_event

ListName = Literal["observations", "events", "withdrawals"]
ItemStatus = Literal["accepted", "duplicate", "rejected"]

_CODE_DETAILS = {
    "unknown-variable": "none of the variables has this name",
    "code-unknown": "the code measures none of the variables",
    "code-refused": "the code measures a quantity that is easily mistaken for a variable",
}
_HOUR = timedelta(hours=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The three lists of a request, as parsed from JSON and otherwise unchecked."""

    observations: Sequence[Any] = ()
    events: Sequence[Any] = ()
    withdrawals: Sequence[Any] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemResult:
    """What became of one item."""

    list: ListName
    index: int
    status: ItemStatus
    item_id: str | None = None
    seq: int | None = None
    flags: tuple[str, ...] = ()
    target: str | None = None
    late: bool = False
    """The hour it belongs to stood already."""
    error: ItemError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What validation needs of the episode as it stands. `seq` is the number before the batch's."""

    admitted_at: datetime
    discharged_at: datetime | None
    seq: int
    by_id: Mapping[str, Entry]
    by_content: Mapping[str, Entry]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What validation needs of the service."""

    vocabulary: EventVocabulary
    """Of the model that answers."""
    others: tuple[EventVocabulary, ...] = ()
    """Of the other loaded models, which read the same log."""
    future_tolerance: timedelta
    allowed_lateness: timedelta


@dataclass(frozen=True, slots=True)
class _Kept:
    """An item that is on record, or will be."""

    seq: int
    item: Entry | Draft


@dataclass(slots=True)
class Validator:
    """Collects the drafts and results of one request."""

    known: Known
    rules: Rules
    now: datetime
    drafts: list[Draft] = field(default_factory=list)
    results: list[ItemResult] = field(default_factory=list)
    _new: dict[str, _Kept] = field(default_factory=dict)
    """Items of this batch by id and by content."""

    def check(self, batch: Batch) -> None:
        """Judge every item, in order: observations, events, withdrawals."""
        for index, raw in enumerate(batch.observations):
            self._judge("observations", index, raw, read_observation)
        for index, raw in enumerate(batch.events):
            self._judge("events", index, raw, read_event)
        for index, raw in enumerate(batch.withdrawals):
            self._judge("withdrawals", index, raw, read_withdrawal)

    def target_known(self, result: ItemResult) -> bool | None:
        """Whether the corrected or withdrawn item has arrived; None if there is none."""
        if result.target is None:
            return None
        kept = self._find(result.target)
        return kept is not None and kept.item.kind != "withdrawal"

    def _find(self, name: str) -> _Kept | None:
        entry = self.known.by_id.get(name) or self.known.by_content.get(name)
        return self._new.get(name) if entry is None else _Kept(entry.seq, entry)

    def _judge(
        self, list_: ListName, index: int, raw: object, read: Callable[[object, str | None], Said]
    ) -> None:
        own_id: str | None = None
        try:
            own_id = own_id_of(raw)
            said = read(raw, own_id)
            kept = self._find(said.item_id)
            if kept is not None:
                self.results.append(_duplicate(list_, index, said, kept))
                return
            draft = self._draft(said)
        except ItemError as error:
            self.results.append(
                ItemResult(list=list_, index=index, status="rejected", item_id=own_id, error=error)
            )
            return
        self.drafts.append(draft)
        seq = self.known.seq + len(self.drafts)
        self._new[said.item_id] = _Kept(seq, draft)
        self._new.setdefault(said.content, _Kept(seq, draft))
        self.results.append(
            ItemResult(
                list=list_,
                index=index,
                status="accepted",
                item_id=draft.item_id,
                seq=seq,
                flags=tuple(draft.payload.get("flags", ())),
                target=draft.target,
                late=self._late(draft),
            )
        )

    def _draft(self, said: Said) -> Draft:
        """What the item means, checked against tables and the episode. Raises ItemError."""
        if said.kind == "withdrawal":
            return Draft(
                kind="withdrawal",
                item_id=said.item_id,
                target=said.target,
                payload={"content": said.content},
            )
        flags: list[str] = []
        payload = (
            _observation(said, flags)
            if said.kind == "observation"
            else _event(said, flags, self.rules)
        )
        available_at = self._placed(said, flags)
        return Draft(
            kind=said.kind,
            item_id=said.item_id,
            effective_at=said.effective_at,
            available_at=available_at,
            target=said.target,
            payload=payload | {"flags": flags, "content": said.content},
        )

    def _placed(self, said: Said, flags: list[str]) -> datetime | None:
        """The time of availability to record. Raises ItemError if the item stands nowhere."""
        assert said.effective_at is not None
        available_at = said.available_at
        if available_at is not None and available_at < said.effective_at:
            flags.append("available-before-effective")
            available_at = said.effective_at
        at = available_at or said.effective_at
        if at > self.now + self.rules.future_tolerance:
            raise ItemError("in-the-future", "the item lies in the future")
        if self.known.discharged_at is not None and at > self.known.discharged_at:
            raise ItemError("after-discharge", "the item lies after the discharge")
        if at >= self.known.admitted_at + MAX_HOURS * _HOUR:
            raise ItemError("beyond-horizon", f"the model reads {MAX_HOURS} hours from admission")
        # A correction became available with its target, which may not have arrived yet.
        inherits = said.target is not None and said.available_at is None
        if at < self.known.admitted_at and not inherits:
            raise ItemError("before-admission", "the item lies before the admission")
        return available_at

    def _late(self, draft: Draft) -> bool:
        if draft.effective_at is None:
            return False
        since = (draft.available_at or draft.effective_at) - self.known.admitted_at
        hour_end = self.known.admitted_at + (since // _HOUR + 1) * _HOUR
        return self.now >= hour_end + self.rules.allowed_lateness


def _duplicate(list_: ListName, index: int, said: Said, kept: _Kept) -> ItemResult:
    """The answer to an item that is already on record. Raises ItemError if it says otherwise."""
    if kept.item.payload["content"] != said.content:
        raise ItemError("id-conflict", "an item of this id but other content is on record")
    return ItemResult(
        list=list_,
        index=index,
        status="duplicate",
        item_id=kept.item.item_id,
        seq=kept.seq,
        flags=tuple(kept.item.payload.get("flags", ())),
        target=kept.item.target,
    )


def _observation(said: Said, flags: list[str]) -> dict[str, Any]:
    assert said.value is not None
    try:
        if said.variable is not None:
            variable, priority = resolve_name(said.variable), 0
        else:
            assert said.code is not None
            code = resolve_code(said.code, said.system)
            variable, priority = code.variable, code.priority
        converted = convert(variable, said.value, said.unit)
    except CodeError as error:
        raise ItemError(error.reason, _CODE_DETAILS[error.reason]) from error
    except UnitError as error:
        raise ItemError(error.reason, f"accepted: {', '.join(u.ucum for u in variable.units)}") \
            from error  # fmt: skip
    if not within_limits(variable, converted.value):
        raise ItemError(
            "value-out-of-range",
            f"possible: {variable.low:g} to {variable.high:g} {variable.unit}",
        )
    if converted.unit_inferred:
        flags.append("unit-inferred")
    if flag := plausibility_flag(variable, converted.value):
        flags.append(flag)
    return {
        "variable": variable.name,
        "value": converted.value,
        "priority": priority,
        "original": {
            "code": said.code,
            "system": said.system,
            "value": said.value,
            "unit": said.unit,
        },
        "unit_inferred": converted.unit_inferred,
    }


def _event(said: Said, flags: list[str], rules: Rules) -> dict[str, Any]:
    assert said.code is not None
    value, unit = said.value, said.unit
    entry = rules.vocabulary.entry(said.code)
    if entry is None:
        flags.append("not-in-vocabulary")
    elif value is not None and entry.unit is not None:
        try:
            # Only a check: the log keeps what was sent, whatever model is in service.
            convert_event(said.code, value, unit, entry.unit)
        except UnitError as error:
            if not any(_reads(vocabulary, said, value) for vocabulary in rules.others):
                raise ItemError(error.reason, str(error)) from error
            flags.append("value-not-read")
    return {"code": said.code, "display": said.display, "value": value, "unit": unit}


def _reads(vocabulary: EventVocabulary, said: Said, value: float) -> bool:
    """Whether a model knows the event and can convert its value."""
    assert said.code is not None
    entry = vocabulary.entry(said.code)
    if entry is None or entry.unit is None:
        return False
    try:
        convert_event(said.code, value, said.unit, entry.unit)
    except UnitError:
        return False
    return True
