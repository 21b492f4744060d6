"""Requests and answers about versions of models. See `service.api.schemas`."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field

from service.api.schemas import Answer, Request


class PutShadow(Request):
    model: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}/[1-9][0-9]{0,8}$")]


class FailureOut(Answer):
    type: Literal[
        "bundle-invalid",
        "not-streamable",
        "not-gated",
        "backend-failed",
        "model-fault",
        "engine-stopped",
    ]
    detail: str


class SlotsOut(Answer):
    used: int
    free: int
    lost: int


class ProgressOut(Answer):
    """Stays that were open when the version came up, and those that are done; those written to
    since that wait; how often one could not be scored.
    """

    scored: int
    total: int
    behind: int
    failed: int


class VersionOut(Answer):
    name: str
    version: str
    state: Literal["available", "loading", "rebuilding", "ready", "active", "unloading", "failed"]
    since: datetime | None
    digest: str | None
    preprocessing_digest: str | None
    slots: SlotsOut | None
    progress: ProgressOut | None
    failure: FailureOut | None


class ChangeOut(Answer):
    """Absolute differences: of probabilities, and of hours for `remaining_los`."""

    n: int
    mean: float
    max: float


class ShadowOut(Answer):
    """`until` is null while it goes on."""

    model: str
    against: str
    since: datetime
    until: datetime | None
    compared: int
    dropped: int
    failed: int
    changes: dict[str, ChangeOut]


class ModelsOut(Answer):
    active: str
    shadow: ShadowOut | None
    trials: list[ShadowOut]
    versions: list[VersionOut]
