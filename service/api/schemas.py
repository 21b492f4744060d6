"""Requests as they are checked, answers as they are described. Unknown fields are errors."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    field_validator,
)
from pydantic_core import PydanticCustomError

from llm4ehr.preprocessing import MAX_HOURS
from service.ingest import ItemResult
from service.times import TimeError, parse_time

Sort = Literal["risk", "admitted_at", "updated_at", "episode_id"]


def _time(value: object) -> datetime:
    try:
        return parse_time(value)
    except TimeError as error:
        raise PydanticCustomError(
            "time_naive" if error.reason == "time-naive" else "time_invalid", "{reason}",
            {"reason": str(error)},
        ) from error  # fmt: skip


def _as_of(value: object) -> int | datetime:
    text = str(value)
    if text.isascii() and text.isdecimal() and len(text) <= 18:
        return int(text)
    # In a query an unescaped "+" of an offset arrives as a space.
    return _time(text.replace(" ", "+"))


def _positive(value: int | datetime) -> int | datetime:
    if isinstance(value, int) and value < 1:
        raise PydanticCustomError("greater_than_equal", "sequence numbers begin with 1")
    return value


Timestamp = Annotated[
    datetime,
    BeforeValidator(_time),
    WithJsonSchema({"type": "string", "format": "date-time"}),
]
AsOf = Annotated[
    int | datetime,
    BeforeValidator(_as_of),
    AfterValidator(_positive),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1, "maximum": 10**18 - 1},
                {"type": "string", "format": "date-time"},
            ]
        }
    ),
]
Hour = Annotated[int, WithJsonSchema({"type": "integer", "minimum": 0, "maximum": MAX_HOURS - 1})]
ItemId = Annotated[str, Field(pattern=r"^[\x21-\x7e]{1,128}$")]
ShortText = Annotated[str, Field(max_length=256)]
MODEL_NAME = r"^[A-Za-z0-9._-]{1,64}$"
MODEL_VERSION = r"^[1-9][0-9]{0,8}$"
PIN = r"^([A-Za-z0-9._-]{1,64}/)?[1-9][0-9]{0,8}$"
Probability = Annotated[float, Field(ge=0, le=1)]
Flags = list[str]


class Request(BaseModel):
    """A body of a request; types are not converted."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Query(BaseModel):
    """Parameters of a query."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, populate_by_name=True)


class Answer(BaseModel):
    """What is answered."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class StaticsIn(Request):
    """Facts known at admission; all optional."""

    age_years: Annotated[float, Field(ge=0, le=130)] | None = None
    sex: Literal["female", "male"] | None = None
    unit_type: Literal["coronary", "cardiac_surgery", "medical", "surgical", "other"] | None = None
    height_cm: Annotated[float, Field(ge=20, le=280)] | None = None
    weight_kg: Annotated[float, Field(ge=0.2, le=700)] | None = None


class PutEpisode(Request):
    admitted_at: Timestamp
    statics: StaticsIn = Field(default_factory=StaticsIn)


class PatchEpisode(Request):
    """Only the fields that are sent change. A static fact or a discharge is taken back by null."""

    admitted_at: Annotated[
        Timestamp | None, WithJsonSchema({"type": "string", "format": "date-time"})
    ] = None
    discharged_at: Timestamp | None = None
    statics: StaticsIn = Field(default_factory=StaticsIn)

    @field_validator("admitted_at")
    @classmethod
    def _cannot_be_taken_back(cls, value: datetime | None) -> datetime:
        if value is None:
            raise PydanticCustomError("null", "an admission can be moved, not taken back")
        return value


class ObservationIn(Request):
    """One measured value of one of the 11 variables. Either `variable` or `code` is required."""

    id: ItemId | None = None
    variable: ShortText | None = None
    code: ItemId | None = None
    system: ItemId | None = None
    value: float
    unit: ShortText | None = None
    time: Timestamp
    available_at: Timestamp | None = None
    corrects: ItemId | None = None


class EventIn(Request):
    """One coded event: a laboratory result, a drug, a procedure."""

    id: ItemId | None = None
    code: ItemId
    system: ItemId | None = None
    display: ShortText | None = None
    value: float | None = None
    unit: ShortText | None = None
    time: Timestamp
    available_at: Timestamp | None = None
    corrects: ItemId | None = None


class WithdrawalIn(Request):
    """Takes an earlier item back."""

    id: ItemId | None = None
    withdraws: ItemId


class PostItems(Request):
    """What is checked of the whole request; the items are judged one by one."""

    admitted_at: Timestamp | None = None
    statics: StaticsIn = Field(default_factory=StaticsIn)
    observations: list[Any] = Field(default_factory=list)
    events: list[Any] = Field(default_factory=list)
    withdrawals: list[Any] = Field(default_factory=list)


class PostItemsDescribed(PostItems):
    """The same, as it is described to clients."""

    observations: list[ObservationIn]
    events: list[EventIn]
    withdrawals: list[WithdrawalIn]


class AsOfQuery(Query):
    as_of: AsOf | None = Field(
        None, description="Answer with what was known at this sequence number or time"
    )
    min_seq: Annotated[int, Field(ge=0)] = Field(
        0, description="409 unless the log holds this entry: read your own writes"
    )


class HoursQuery(AsOfQuery):
    hour: Hour | None = Field(None, description="One hour since admission, 0 to 199")
    from_: Hour | None = Field(None, alias="from", description="First hour of a range")
    to: Hour | None = Field(None, description="Last hour of a range, included")
    model_version: Annotated[str, Field(pattern=PIN)] | None = Field(
        None,
        description="Answer by this loaded version of the active model, or by NAME/VERSION",
        examples=["2"],
    )


class ListQuery(Query):
    sort: Sort = "risk"
    order: Literal["asc", "desc"] | None = Field(
        None, description="Default: ascending by episode_id, else descending"
    )
    limit: Annotated[int, Field(ge=1, le=500)] = 50
    cursor: Annotated[str, Field(max_length=512)] | None = None
    min_risk: Probability | None = None
    status: Literal["open", "discharged"] | None = None


class ItemErrorOut(Answer):
    type: str
    detail: str


class ItemResultOut(Answer):
    list: Literal["observations", "events", "withdrawals"]
    index: int
    status: Literal["accepted", "duplicate", "rejected"]
    item_id: str | None
    seq: int | None
    flags: Flags
    target_known: bool | None = None
    error: ItemErrorOut | None = None

    @staticmethod
    def of(result: ItemResult, target_known: bool | None) -> dict[str, Any]:
        """One item of an answer; built without the model, which only describes it."""
        out: dict[str, Any] = {
            "list": result.list,
            "index": result.index,
            "status": result.status,
            "item_id": result.item_id,
            "seq": result.seq,
            "flags": [*result.flags],
        }
        if target_known is not None:
            out["target_known"] = target_known
        if result.error is not None:
            out["error"] = {"type": result.error.type, "detail": result.error.detail}
        return out


class PostedOut(Answer):
    episode_id: str
    seq: int
    admission: Literal["created", "unchanged", "differs"] | None
    accepted: int
    duplicates: int
    rejected: int
    items: list[ItemResultOut]


class EpisodeOut(Answer):
    episode_id: str
    seq: int
    admitted_at: datetime
    discharged_at: datetime | None
    updated_at: datetime
    statics: StaticsIn
    head_hour: int | None
    newest_data_at: datetime | None
    counts: dict[str, int]
    ignored: dict[str, int]


class WithheldOut(Answer):
    reason: Literal["no-data", "stale-data", "scoring-disabled", "not-computed"]


class PrecisionChangeOut(Answer):
    """Absolute change of the answers of a task; 99.9 % are at most `p999`."""

    unit: Literal["probability", "hours"]
    max: float
    p999: float
    mean: float


class GateOut(Answer):
    """What a reduced precision was measured to change on real stays."""

    limit: float
    stays: int
    hours: int
    changes: dict[str, PrecisionChangeOut]


class NumericsOut(Answer):
    precision: Literal["fp32", "bf16"]
    backend: str
    rows: int
    threads: int
    kernel: Literal["compiled", "reference"] | None
    gate: GateOut | None


class ModelOut(Answer):
    model: str
    version: str
    digest: str
    preprocessing_digest: str
    numerics: NumericsOut


class ProvenanceOut(ModelOut):
    seq: int
    as_of: int | datetime | None
    newest_data_at: datetime | None


class HourOut(Answer):
    hour: int
    hour_start: datetime
    hour_end: datetime
    status: Literal["preliminary", "final", "amended"]
    imputed_share: Probability | None
    data_age_hours: float | None
    score_withheld: WithheldOut | None


class HoursIntervalOut(Answer):
    """Holds the truth for a share of at least `coverage` of stays like those it was fitted on."""

    low: Annotated[float, Field(ge=0)]
    high: Annotated[float, Field(ge=0)]
    coverage: Annotated[float, Field(gt=0, lt=1)]


class HourRiskOut(HourOut):
    decompensation: Probability | None
    mortality: Probability | None
    remaining_los_hours: float | None
    remaining_los_interval_hours: HoursIntervalOut | None
    phenotypes: dict[str, Probability]


class HourEmbeddingOut(HourOut):
    embedding: list[float] | None


class _HoursOut(Answer):
    episode_id: str
    seq: int
    score_withheld: WithheldOut | None
    provenance: ProvenanceOut


class RiskOut(_HoursOut):
    hours: list[HourRiskOut]


class EmbeddingsOut(_HoursOut):
    hours: list[HourEmbeddingOut]


class EpisodeRowOut(Answer):
    episode_id: str
    seq: int
    admitted_at: datetime
    discharged_at: datetime | None
    updated_at: datetime
    newest_data_at: datetime | None
    hour: int | None
    status: Literal["preliminary", "final", "amended"] | None
    risk: Probability | None
    decompensation: Probability | None
    mortality: Probability | None
    remaining_los_hours: float | None
    scored_seq: int | None
    score_withheld: WithheldOut | None


class EpisodeListOut(Answer):
    episodes: list[EpisodeRowOut]
    next_cursor: str | None
    complete: bool
    provenance: ModelOut


class FieldErrorOut(Answer):
    path: str
    type: str
    detail: str


class ProblemOut(Answer):
    """RFC 9457 problem details. `detail` never repeats a value or an id."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    errors: list[FieldErrorOut] = Field(default_factory=list, max_length=100)
    more: bool = Field(False, description="There are more errors than are listed")
    items: list[ItemResultOut] = Field(default_factory=list)
