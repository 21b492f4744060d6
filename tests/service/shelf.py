"""Versions of models with engines that are made up, and the service in front of them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from service.models.version import Model, Name
from tests.service.fakes import BUNDLE, Client, FakeEngine, fake_model, running

ONE = "/models/llm4ehr/versions"


class Shelf:
    """Versions 1 to 5 of the model, and one of another; loading waits while the gate is shut."""

    def __init__(self) -> None:
        self.engines: dict[Name, FakeEngine] = {}
        self.fault: Exception | None = None
        self.close_fault: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.closed: list[Name] = []
        self.prepare: Callable[[FakeEngine], object] = lambda engine: None
        """Called with every engine before it scores."""

    def on_disk(self) -> list[Name]:
        return [*(Name("llm4ehr", n) for n in range(1, 6)), Name("other", 1)]

    def load(self, name: Name) -> Model:
        assert self.gate.wait(60)
        if self.fault is not None:
            raise self.fault
        digest = f"{name.version}{name.name[0]}" * 32
        bundle = replace(BUNDLE, name=name.name, version=str(name.version), digest=digest)
        engine = self.engines[name] = FakeEngine(bundle)
        self.prepare(engine)
        return replace(fake_model(engine), close=lambda: self._close(name))

    def _close(self, name: Name) -> None:
        self.closed.append(name)
        if self.close_fault is not None:
            raise self.close_fault


class House(Client):
    """A client with the shelf behind the service."""

    shelf: Shelf

    async def state(self, version: int, name: str = "llm4ehr") -> dict[str, Any]:
        body: dict[str, Any] = (await self.http.get(f"/models/{name}/versions/{version}")).json()
        return body

    async def control(self, version: int, verb: str, name: str = "llm4ehr") -> Any:
        return await self.http.post(f"/models/{name}/versions/{version}/{verb}")

    async def until(self, version: int, state: str, name: str = "llm4ehr") -> dict[str, Any]:
        async with asyncio.timeout(60):
            while True:
                body = await self.state(version, name)
                if body["state"] == state:
                    return body
                await asyncio.sleep(0.001)

    async def ready(self, version: int, name: str = "llm4ehr") -> FakeEngine:
        assert (await self.control(version, "load", name)).status_code == 202
        await self.until(version, "ready", name)
        return self.shelf.engines[Name(name, version)]


@asynccontextmanager
async def housed(log_path: Path, **options: Any) -> AsyncIterator[House]:
    """The service with version 1 active and the shelf behind it."""
    shelf = Shelf()
    async with running(log_path, loader=shelf, model_control=True, **options) as c:
        house = House(c.http, c.engine, c.clock, c.log, c.app)
        house.shelf = shelf
        yield house
