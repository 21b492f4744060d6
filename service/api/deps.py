"""What the routes share: the service behind them and the shapes of their parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any

from fastapi import Depends, Path, Request

from service.access.authenticator import Authenticator
from service.api.limits import Limits
from service.api.metrics import Metrics
from service.api.window import Window
from service.core import Engine
from service.episodes import EpisodeService
from service.follow import Follower
from service.lifecycle import Lifecycle
from service.log.base import EventLog
from service.models.manager import Models
from service.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """Everything a route may use; one for each app."""

    settings: Settings
    service: EpisodeService
    models: Models
    follower: Follower
    log: EventLog
    authenticator: Authenticator
    limits: Limits
    metrics: Metrics
    clock: Callable[[], datetime]
    lifecycle: Lifecycle
    process: Callable[[], dict[str, Any]]
    """What the process says of itself."""
    window: Window

    @property
    def engine(self) -> Engine:
        """The engine that answers now. What takes longer than a moment asks `models.serving`."""
        return self.models.active.model.engine

    @property
    def complete(self) -> bool:
        """Whether the list has every episode as it is in the log, as far as can be known."""
        return self.service.live.complete and self.follower.level

    def describe(self) -> dict[str, Any]:
        """What the process and the engines say of themselves, for operators."""
        return {**self.process(), "models": self.models.statuses()}


async def _context(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


ContextDep = Annotated[Context, Depends(_context)]
EPISODE_ID = r"^[A-Za-z0-9._:-]{1,128}$"
EpisodeId = Annotated[
    str,
    Path(
        pattern=EPISODE_ID,
        description="The client's opaque id of an ICU stay",
        examples=["icu-2041"],
    ),
]
