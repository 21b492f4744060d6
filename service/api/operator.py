"""GET /operator/summary: how the service is doing, in one answer. Nothing in it is of a patient."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter
from prometheus_client import CollectorRegistry
from pydantic import BaseModel, ConfigDict, Field

from llm4ehr import __version__
from service.api import examples
from service.api.access import Operate
from service.api.deps import ContextDep
from service.api.openapi import example

router = APIRouter(prefix="/operator", tags=["operator"])

HISTOGRAMS = {
    "llm4ehr_ingest_commit_seconds": "commit",
    "llm4ehr_engine_queue_seconds": "engine_queue",
    "llm4ehr_engine_tick_seconds": "engine_tick",
    "llm4ehr_engine_answer_seconds": "engine_answer",
    "llm4ehr_score_published_seconds": "score_published",
    "llm4ehr_event_loop_lag_seconds": "event_loop_lag",
}
"""Which histograms have figures, and under which name."""

_Count = Annotated[int, Field(ge=0)]
_Seconds = Annotated[float, Field(ge=0)]


class _Out(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ServiceOut(_Out):
    version: str
    uptime_seconds: _Seconds
    ready: bool
    draining: bool
    scoring_enabled: bool
    authentication: Literal["required", "open"]


class ModelOut(_Out):
    """The model that answers."""

    name: str
    version: str
    digest: str
    preprocessing_digest: str


class LogOut(_Out):
    available: bool
    waiting_writes: _Count


class CatchUpOut(_Out):
    """What was done since the start: whether all of the log was seen, episodes known so far, open
    stays that had to be scored, and those of them that are.
    """

    complete: bool
    episodes: _Count
    to_score: _Count
    scored: _Count


class FiguresOut(_Out):
    """Of the last minutes; times in seconds, null where nothing was observed."""

    per_second: float
    p50: float | None
    p99: float | None


class LastOut(_Out):
    seconds: _Seconds
    figures: dict[str, FiguresOut]


class SinceStartOut(_Out):
    evictions: _Count
    out_of_memory: _Count
    model_faults: _Count
    audits: _Count
    mismatches: _Count
    rows: dict[str, _Count]
    refusals: dict[str, _Count]


class SummaryOut(_Out):
    service: ServiceOut
    model: ModelOut
    engine: dict[str, Any]
    """Threads, kernel; backend, tick sizes, slots and stays of the engine of every model."""
    log: LogOut
    catch_up: CatchUpOut
    last: LastOut
    since_start: SinceStartOut


@router.get(
    "/summary",
    operation_id="getOperatorSummary",
    summary="State, rates and counts of the whole service",
    responses={200: example(examples.OPERATOR_SUMMARY)},
)
async def summary(context: ContextDep, visit: Operate) -> SummaryOut:
    """What the metrics say, worked out for people. Rates and quantiles are of the last minutes."""
    bundle, live = context.engine.bundle, context.service.live
    seconds, figures = context.window.figures()
    available, draining = context.log.available(), context.lifecycle.draining
    return SummaryOut(
        service=ServiceOut(
            version=__version__,
            uptime_seconds=context.lifecycle.uptime_s,
            ready=available and context.engine.alive() and not live.catch_up.ended and not draining,
            draining=draining,
            scoring_enabled=context.settings.scoring_enabled,
            authentication=context.settings.authentication,
        ),
        model=ModelOut(
            name=bundle.name,
            version=bundle.version,
            digest=bundle.digest,
            preprocessing_digest=bundle.preprocessing_digest,
        ),
        engine=context.describe(),
        log=LogOut(available=available, waiting_writes=context.service.waiting_writes),
        catch_up=CatchUpOut(
            complete=context.complete,
            episodes=sum(1 for _ in live.summaries),
            to_score=live.catch_up.to_score,
            scored=live.catch_up.n_scored,
        ),
        last=LastOut(
            seconds=seconds,
            figures={
                HISTOGRAMS[name]: FiguresOut(
                    per_second=found.per_second, p50=found.p50, p99=found.p99
                )
                for name, found in figures.items()
            },
        ),
        since_start=_since_start(context.metrics.registry),
    )


def _since_start(registry: CollectorRegistry) -> SinceStartOut:
    return SinceStartOut(
        evictions=_total(registry, "llm4ehr_kv_evictions"),
        out_of_memory=_total(registry, "llm4ehr_engine_out_of_memory"),
        model_faults=_total(registry, "llm4ehr_engine_model_faults"),
        audits=_total(registry, "llm4ehr_replay_audits"),
        mismatches=_total(registry, "llm4ehr_replay_mismatch")
        + _total(registry, "llm4ehr_engine_mismatch"),
        rows=_by(registry, "llm4ehr_engine_rows", "cause"),
        refusals=_by(registry, "llm4ehr_refusals", "reason"),
    )


def _total(registry: CollectorRegistry, name: str) -> int:
    return sum(_by(registry, name, "model").values())


def _by(registry: CollectorRegistry, name: str, label: str) -> dict[str, int]:
    """Sums of a counter by the value of one label."""
    found: dict[str, int] = {}
    for family in registry.restricted_registry([f"{name}_total"]).collect():
        for sample in family.samples:
            value = sample.labels.get(label, "")
            found[value] = found.get(value, 0) + int(sample.value)
    return found
