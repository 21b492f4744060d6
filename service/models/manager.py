"""Several versions of models side by side: load, rebuild, switch, roll back, unload, compare.

Runs on the event loop. One version is active: it answers whoever does not ask for another one. The
others that are loaded keep their scores up behind it, so that a switch is a change of one name. A
request is answered by the version it began with, to its end.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from typing import Any

from prometheus_client import CollectorRegistry

from service.core import BundleInfo
from service.live import LiveScores
from service.log.base import EventLog
from service.memory import Memory
from service.models.shadow import Counts, Shadow, ShadowMetrics, Trial
from service.models.version import (
    Condition,
    Failure,
    Loader,
    LoadError,
    Model,
    ModelRefused,
    Name,
    NoLoader,
    Serving,
    Version,
)
from service.settings import Settings
from service.state import EpisodeState, Scored
from service.units import EventVocabulary

_logger = logging.getLogger(__name__)


class Models:
    """All versions that are loaded; `first` is active from the start."""

    def __init__(
        self,
        first: Model,
        *,
        settings: Settings,
        log: EventLog,
        memory: Memory,
        clock: Callable[[], datetime],
        registry: CollectorRegistry,
        loader: Loader | None = None,
        on_active: Callable[[BundleInfo], None] = lambda bundle: None,
        on_published: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self._settings = settings
        self._log = log
        self._memory = memory
        self._clock = clock
        self._loader = loader or NoLoader()
        self._on_active = on_active
        self._on_published = on_published
        self._shadow_metrics = ShadowMetrics(registry)
        self._trial: Trial | None = None
        self._trials: dict[Name, Trial] = {}
        self._closing: set[asyncio.Task[None]] = set()
        bundle = first.engine.bundle
        version = Version(Name(bundle.name, int(bundle.version)), "active", clock(), model=first)
        version.live = self._live(first, leads=True)
        self._versions = {version.name: version}
        self._active = Serving(version, first, version.live)

    def start(self) -> None:
        """Begin to score the open stays that are in the log."""
        self._active.model.start()
        self._active.model.go_first()
        self._active.live.start()

    async def stop(self) -> None:
        """Stop all scoring and all engines."""
        self.end_trial()
        for version in list(self._versions.values()):
            if version.task is not None:
                version.task.cancel()
                await asyncio.wait([version.task])
        if self._closing:
            await asyncio.wait(self._closing)
        for version in list(self._versions.values()):
            if version.live is not None:
                await version.live.stop()
            if version.model is not None:
                await asyncio.to_thread(version.model.close)

    # --- answering ---------------------------------------------------------------------------

    @property
    def active(self) -> Serving:
        """The version that answers now. A request takes it once, with `serving`."""
        return self._active

    @contextmanager
    def serving(self, pin: str | None = None) -> Iterator[Serving]:
        """The version that answers a request from its begin to its end.

        `pin` is NAME/VERSION, or VERSION of the active model. Raises ModelRefused.
        """
        serving = self._active
        if pin is not None:
            name, _, number = pin.rpartition("/")
            version = self._versions.get(Name(name or serving.version.name.name, int(number)))
            found = None if version is None else _able(version)
            if found is None:
                raise ModelRefused("model-not-loaded", "that version is not loaded")
            serving = found
        with serving.version.used():
            yield serving

    def kept_up(self) -> list[Serving]:
        """The versions that have the scores of all open stays: the active and the ready ones."""
        versions = [self._versions[n] for n in sorted(self._versions)]
        found = (_able(v) for v in versions if v.condition in ("ready", "active"))
        return [serving for serving in found if serving is not None]

    def able(self, name: str) -> list[Serving]:
        """The loaded versions of a model that can answer, by number."""
        found = (_able(self._versions[n]) for n in sorted(self._versions) if n.name == name)
        return [serving for serving in found if serving is not None]

    def changed(self, state: EpisodeState, *, urgent: bool = True) -> None:
        """Take notice of a write: never waits and never fails. One that is not `urgent` is scored
        when there is time.
        """
        for version in self._versions.values():
            if version.live is not None:
                version.live.changed(state, urgent=urgent)

    def look_at(self, episode_id: str) -> None:
        """Find out, when there is time, what the log has of an episode."""
        for version in self._versions.values():
            if version.live is not None:
                version.live.catch_up.leave_behind(episode_id)

    def forget(self, episode_id: str) -> None:
        """Know nothing of an episode any more."""
        for version in self._versions.values():
            if version.live is not None:
                version.live.forget(episode_id)

    @property
    def vocabularies(self) -> tuple[EventVocabulary, ...]:
        """Of the active model first, then of the other loaded ones."""
        others = (
            v.model for v in self._versions.values() if v.model and v is not self._active.version
        )
        return (self._active.model.vocabulary, *(model.vocabulary for model in others))

    # --- operating ---------------------------------------------------------------------------

    def statuses(self) -> list[dict[str, Any]]:
        """Figures of the engines of all loaded versions."""
        return [
            {"model": str(v.name), **asdict(status)}
            for v in self._versions.values()
            if v.model is not None and (status := v.model.status()) is not None
        ]

    @property
    def trial(self) -> Trial | None:
        """The version on trial, if there is one."""
        return self._trial

    @property
    def trials(self) -> list[Trial]:
        """The last trial of every version, those that have ended too, by name and number."""
        return [self._trials[name] for name in sorted(self._trials)]

    async def versions(self) -> list[Version]:
        """All versions that are on disk or were asked for, by name and number."""
        known = {name: self._alive(v) for name, v in self._versions.items()}
        for name in await asyncio.to_thread(self._loader.on_disk):
            known.setdefault(name, Version(name, "available", self._clock()))
        return [known[name] for name in sorted(known)]

    async def version(self, name: Name) -> Version:
        """One of them. Raises ModelRefused."""
        for version in await self.versions():
            if version.name == name:
                return version
        raise ModelRefused("model-unknown", "there is no such model or version")

    async def load(self, name: Name) -> Version:
        """Begin to bring a version up; one that is loaded already stays as it is.

        Raises ModelRefused.
        """
        version = await self.version(name)
        held = self._versions.get(name)
        if held is not None and held.condition == "unloading":
            raise ModelRefused("model-not-ready", "the version is being unloaded; load it after")
        if held is not None and held.condition != "failed":
            return held
        loaded = [v for v in self._versions.values() if v.condition != "failed"]
        if len(loaded) >= self._settings.max_models:
            raise ModelRefused(
                "too-many-models", f"{len(loaded)} versions are loaded; unload one of them first"
            )
        version = Version(name, "loading", self._clock())
        self._versions[name] = version
        version.task = _beside(self._bring_up(version))
        return version

    def activate(self, name: Name) -> Version:
        """Have a version that is ready answer from now on. Raises ModelRefused."""
        version = self._loaded(name)
        if version is self._active.version:
            return version
        serving = _able(version)
        if serving is None or version.condition != "ready":
            raise ModelRefused(
                "model-not-ready", f"the version is {version.condition}; it has to be ready"
            )
        self.end_trial()
        former, self._active = self._active, serving
        former.live.leads, serving.live.leads = False, True
        self._turn(former.version, "ready")
        self._turn(version, "active")
        serving.model.go_first()
        self._on_active(serving.model.engine.bundle)
        _logger.info("model %s answers, after %s", name, former.version.name)
        return version

    def unload(self, name: Name) -> Version:
        """Begin to let a version go, once the requests that it answers are done.

        Raises ModelRefused.
        """
        version = self._loaded(name)
        if version is self._active.version:
            raise ModelRefused("model-active", "the version answers; activate another one first")
        if version.condition == "loading":
            raise ModelRefused("model-not-ready", "the version is being loaded")
        if version.condition != "unloading":
            self._end_trial_of(version)
            self._turn(version, "unloading")
            version.task = _beside(self._let_go(version, version.task))
        return version

    def try_out(self, name: Name) -> Trial:
        """Compare a version that is ready with the active one from now on. Raises ModelRefused."""
        version = self._loaded(name)
        live = version.live
        if version is self._active.version:
            raise ModelRefused("model-active", "the version answers; try another one")
        if version.condition != "ready" or live is None:
            raise ModelRefused(
                "model-not-ready", f"the version is {version.condition}; it has to be ready"
            )
        self.end_trial()
        shadow = Shadow(Counts(self._shadow_metrics, str(name)))
        self._trial = self._trials[name] = Trial(
            version, self._active.version.name, self._clock(), shadow
        )

        def active_scored(scored: Scored) -> None:
            shadow.active_scored(scored)
            # Whoever asked the active one for it: the other one does not know of reads.
            live.catch_up.leave_behind(scored.view.episode_id)

        self._active.live.on_scored = active_scored
        live.on_scored = shadow.trial_scored
        live.on_fault = shadow.trial_failed
        return self._trial

    def end_trial(self) -> None:
        """Compare no more. What was found is kept."""
        trial, self._trial = self._trial, None
        if trial is not None:
            trial.until = self._clock()
            for live in (self._active.live, trial.of.live):
                if live is not None:
                    live.on_scored = lambda scored: None
                    live.on_fault = lambda view: None

    # --- within ------------------------------------------------------------------------------

    def _live(self, model: Model, *, leads: bool) -> LiveScores:
        return LiveScores(
            engine=model.engine,
            settings=self._settings,
            load=self._memory.load,
            log=self._log,
            leads=leads,
            on_published=self._on_published,
        )

    def _turn(self, version: Version, condition: Condition) -> None:
        version.condition, version.since = condition, self._clock()

    def _fail(self, version: Version, error: LoadError) -> None:
        self._end_trial_of(version)
        if version.live is not None:
            version.live.cancel()
        task = _beside(self._close(version, version.model, version.live))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        version.model = version.live = None
        version.failure = Failure(type=error.type, detail=str(error))
        self._turn(version, "failed")
        _logger.error("model %s cannot be used: %s", version.name, error.type)

    def _alive(self, version: Version) -> Version:
        """The version, found out to have failed if its engine has died."""
        if (
            version.condition in ("rebuilding", "ready")
            and version.model is not None
            and not version.model.engine.alive()
        ):
            self._fail(version, LoadError("engine-stopped", "the engine of this version died"))
        return version

    def _loaded(self, name: Name) -> Version:
        version = self._versions.get(name)
        if version is None or self._alive(version).condition == "failed":
            raise ModelRefused("model-not-loaded", "that version is not loaded")
        return version

    def _end_trial_of(self, version: Version) -> None:
        if self._trial is not None and self._trial.of is version:
            self.end_trial()

    async def _bring_up(self, version: Version) -> None:
        try:
            model = version.model = await asyncio.to_thread(self._loader.load, version.name)
            model.start()
            live = version.live = self._live(model, leads=False)
            self._turn(version, "rebuilding")
            live.start(after=self._active.live)
            warm = await live.catch_up.finished()
            if self._alive(version).condition != "rebuilding":
                return
            if not warm:
                raise LoadError("backend-failed", "the rebuild ended before its time")
            if n := live.catch_up.n_failed:
                raise LoadError("model-fault", f"{n} stays could not be scored")
        except LoadError as error:
            self._fail(version, error)
            return
        except Exception as error:
            # Its message might hold anything; the type says enough to look into the log.
            self._fail(version, LoadError("backend-failed", type(error).__name__))
            return
        self._turn(version, "ready")
        _logger.info("model %s is ready", version.name)

    async def _let_go(self, version: Version, bringing_up: asyncio.Task[None] | None) -> None:
        if bringing_up is not None and not bringing_up.done():
            bringing_up.cancel()
            await asyncio.wait([bringing_up])
        try:
            await self._close(version, version.model, version.live)
        finally:
            del self._versions[version.name]
        _logger.info("model %s is unloaded", version.name)

    async def _close(self, version: Version, model: Model | None, live: LiveScores | None) -> None:
        """Stop what scored with a version once nobody uses it, and give its memory back."""
        await version.unused()
        if live is not None:
            await live.stop()
        if model is not None:
            try:
                await asyncio.to_thread(model.close)
            except Exception as error:
                kind = type(error).__name__
                _logger.error("model %s was not closed in order: %s", version.name, kind)
        del model, live
        version.model = version.live = None
        await asyncio.to_thread(_give_memory_back)


def _beside(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Work that goes on after the request that began it, and is no part of its trace."""
    return asyncio.create_task(work, context=contextvars.Context())


def _give_memory_back() -> None:
    """A network and its slots stand in circles, some of which were set aside at the start."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def _able(version: Version) -> Serving | None:
    """The version as one that can answer; None if it cannot, or not any more."""
    if version.condition not in ("rebuilding", "ready", "active"):
        return None
    if version.model is None or version.live is None:
        return None
    return Serving(version, version.model, version.live)
