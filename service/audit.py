"""The service checks itself: what it serves of a stay is what the log gives, to the last bit."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from random import Random
from typing import Literal

from prometheus_client import CollectorRegistry, Counter

from service.core import EngineStopped, ModelFault, Overloaded, Scores, episode_at
from service.log.base import EventLog, LogCorrupt, LogUnavailable
from service.memory import Memory
from service.models.manager import Models
from service.models.version import Serving

_logger = logging.getLogger(__name__)

Outcome = Literal["equal", "different", "corrupt", "skipped"]


class Auditor:
    """Computes random stays again, from the log and in a slot of their own, while nothing else is
    to be done. A stay that was served other numbers is forgotten and scored anew.
    """

    def __init__(
        self,
        models: Models,
        log: EventLog,
        memory: Memory,
        registry: CollectorRegistry,
        *,
        interval_s: float | None,
        random: Random,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._models = models
        self._log = log
        self._memory = memory
        self._interval_s = interval_s
        self._random = random
        self._sleep = sleep
        self._turn = -1
        self._task: asyncio.Task[None] | None = None
        self._audits = Counter(
            "llm4ehr_replay_audits", "Stays computed again from the log", registry=registry
        )
        self._mismatches = Counter(
            "llm4ehr_replay_mismatch",
            "Stays that were served other bits than the log gives; must stay 0",
            registry=registry,
        )

        self._corrupt = Counter(
            "llm4ehr_log_corrupt",
            "Stays whose entries in the log are not as they were written; must stay 0",
            registry=registry,
        )

    def start(self) -> None:
        """Begin to audit, unless there is no interval."""
        if self._interval_s is not None:
            self._task = asyncio.create_task(self._run(self._interval_s))

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self, interval_s: float) -> None:
        while True:
            await self._sleep(interval_s)
            try:
                await self.audit()
            except (EngineStopped, LogUnavailable, ModelFault, Overloaded):
                continue  # they show in health and metrics; nothing was compared
            except Exception as error:
                _logger.error("an audit failed: %s", type(error).__name__)

    async def audit(self) -> Outcome:
        """Check one stay of one version: the active one and those that are ready, in turn.
        `skipped` if nothing is kept of it, or there is no time for it.

        Raises EngineStopped, LogUnavailable, ModelFault, Overloaded.
        """
        versions = self._models.kept_up()
        if not self._models.active.model.engine.idle() or not versions:
            return "skipped"
        self._turn += 1
        serving = versions[self._turn % len(versions)]
        with serving.version.used():
            return await self._audit(serving)

    async def _audit(self, serving: Serving) -> Outcome:
        engine, live = serving.model.engine, serving.live
        # What is not kept is computed when it is asked for: there is nothing to compare with.
        states = live.kept_states()
        if not engine.idle() or not states:
            return "skipped"
        state = self._random.choice(states)
        episode_id, served = state.episode_id, live.kept(state)
        # The log, not the memory: what is wrong there is to be found as well.
        try:
            await self._log.verify(episode_id)
            entries = await self._log.entries(episode_id)
        except LogCorrupt:
            self._corrupt.inc()
            _logger.critical("an audit found a stay in the log that is not as it was written")
            return "corrupt"
        if served is None or not entries or entries[-1].seq != served.view.seq:
            return "skipped"
        view = episode_at(entries)
        if view.deleted or view.head_hour < 0:
            return "skipped"
        fresh = await engine.submit_as_of(view, len(served.scores.hours))
        self._audits.inc()
        if _same_bits(fresh, served.scores):
            return "equal"
        self._mismatches.inc()
        _logger.critical(
            "an audit of model %s found other numbers than were served; scoring the stay anew",
            serving.version.name,
        )
        self._memory.drop(episode_id)
        if (anew := await self._memory.load(episode_id)) is not None:
            live.again(anew)
        return "different"


def _same_bits(a: Scores, b: Scores) -> bool:
    return a.hours == b.hours and a.embeddings.tobytes() == b.embeddings.tobytes()
