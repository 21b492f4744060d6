"""One version of a model, from the folder on disk to the engine that answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, NamedTuple, Protocol

from service.core import Engine, EngineStatus
from service.live import LiveScores
from service.units import EventVocabulary

Condition = Literal["available", "loading", "rebuilding", "ready", "active", "unloading", "failed"]
"""On disk only; being read and verified; its open stays being scored; scores all of them, may be
activated; answers; finishes what it began; cannot be used, see its failure."""

FailureType = Literal[
    "bundle-invalid",
    "not-streamable",
    "not-gated",
    "backend-failed",
    "model-fault",
    "engine-stopped",
]


class Name(NamedTuple):
    """NAME/VERSION."""

    name: str
    version: int

    def __str__(self) -> str:
        return f"{self.name}/{self.version}"


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A verified bundle and the engine that scores with it."""

    engine: Engine
    vocabulary: EventVocabulary
    start: Callable[[], None] = _nothing
    close: Callable[[], None] = _nothing
    """Stops the engine after its tick; may be called twice, on any thread."""
    go_first: Callable[[], None] = _nothing
    """From now on its engine goes first wherever several share a processor."""
    status: Callable[[], EngineStatus | None] = lambda: None
    retry_after_s: Callable[[], int] = lambda: 1
    """Seconds after which the engine may have worked off what waits now."""


class LoadError(Exception):
    """The version cannot be used; the message holds nothing that is not in the repository."""

    def __init__(self, type_: FailureType, detail: str) -> None:
        super().__init__(detail)
        self.type: FailureType = type_


class ModelRefused(Exception):
    """What was asked of a version is not possible. `problem` names the answer to the client."""

    def __init__(self, problem: str, detail: str) -> None:
        super().__init__(detail)
        self.problem = problem


class Loader(Protocol):
    """Where further models come from. Both methods block and may be called on any thread."""

    def on_disk(self) -> list[Name]:
        """All versions there are, by name and number."""
        ...

    def load(self, name: Name) -> Model:
        """Verify a bundle and make its engine, not started. Raises LoadError."""
        ...


class NoLoader:
    """A service that was given one model and no place for others."""

    def on_disk(self) -> list[Name]:
        return []

    def load(self, name: Name) -> Model:
        raise LoadError("bundle-invalid", "there is no repository of models")


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a version cannot be used."""

    type: FailureType
    detail: str


@dataclass(slots=True, eq=False)
class Version:
    """What is known of a version that is loaded, or was asked to be."""

    name: Name
    condition: Condition
    since: datetime
    model: Model | None = None
    live: LiveScores | None = None
    failure: Failure | None = None
    task: asyncio.Task[None] | None = None
    """Brings it up, or unloads it."""
    _users: int = 0
    _unused: asyncio.Event = field(default_factory=asyncio.Event)

    @contextmanager
    def used(self) -> Iterator[None]:
        """While inside it is not unloaded."""
        self._users += 1
        self._unused.clear()
        try:
            yield
        finally:
            self._users -= 1
            if self._users == 0:
                self._unused.set()

    async def unused(self) -> None:
        """Wait until nobody uses it."""
        if self._users:
            await self._unused.wait()


@dataclass(frozen=True, slots=True)
class Serving:
    """A version that can answer."""

    version: Version
    model: Model
    live: LiveScores
