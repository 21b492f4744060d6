"""Services that are killed all the time while clients write to them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random
from typing import Any

import httpx

from tests.end_to_end.server import PATIENCE_S, free_port
from tests.postgres import Cluster
from tests.torture.life import born
from tests.torture.work import Client, Ledger

N_CLIENTS = 4

# Seconds. A start takes about a sixth of a second of a processor.
_WHILE_STARTING, _WHILE_SERVING, _WHILE_STOPPING = 0.5, 0.6, 0.2
_BETWEEN_RESTARTS = (4.0, 12.0)


class Slot:
    """One replica, life after life on one port."""

    def __init__(self, lives: ForkServerContext, folder: Path, settings: dict[str, Any]) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._lives = lives
        self._output = folder / f"output-{self.port}.txt"
        self._settings = settings | {"port": self.port}
        self._life: BaseProcess | None = None
        self.serves = False
        """Whether it was ready, and has not been killed since."""

    def start(self) -> None:
        self._life = born(self._lives, self._output, self._settings)

    async def ready(self) -> None:
        """Until it answers. What ends by itself must have had a reason that it names."""
        assert self._life is not None
        async with httpx.AsyncClient(base_url=self.url, timeout=PATIENCE_S) as http:
            async with asyncio.timeout(PATIENCE_S):
                while True:
                    assert self._life.is_alive(), self.output
                    try:
                        if (await http.get("/v2/health/ready")).status_code == 200:
                            self.serves = True
                            return
                    except httpx.TransportError:
                        pass
                    await asyncio.sleep(0.03)

    def terminate(self) -> None:
        """SIGTERM."""
        assert self._life is not None
        self._life.terminate()

    def kill(self) -> None:
        """SIGKILL, and its end."""
        self.serves = False
        if self._life is not None:
            self._life.kill()
            self._life.join(PATIENCE_S)
            self._life.close()
            self._life = None

    @property
    def pid(self) -> int:
        assert self._life is not None
        assert self._life.pid is not None
        return self._life.pid

    @property
    def output(self) -> str:
        return self._output.read_text() if self._output.exists() else ""


class Torture:
    """Kills of all slots together, so many in number, while clients write."""

    def __init__(
        self,
        slots: list[Slot],
        ledger: Ledger,
        *,
        kills: int,
        seed: int,
        cluster: Cluster | None = None,
        advance: Callable[[], None] = lambda: None,
    ) -> None:
        self.counts: Counter[str] = Counter()
        """Kills, by what the replica was doing, and restarts of the database."""
        self._slots = slots
        self._ledger = ledger
        self._left = kills
        self._seed = seed
        self._cluster = cluster
        self._advance = advance
        self._over = False
        self._restarting = False

    async def run(self) -> None:
        """In the end all slots are ready, and everything that was sent is acknowledged."""
        clients = [Client(i, self._seed, self._urls, self._ledger) for i in range(N_CLIENTS)]
        async with asyncio.TaskGroup() as group:
            for client in clients:
                group.create_task(client.work(lambda: not self._over))
            if self._cluster is not None:
                group.create_task(self._restart(self._cluster))
            await asyncio.gather(*(self._kill(i, slot) for i, slot in enumerate(self._slots)))
            self._over = True

    def _urls(self) -> list[str]:
        """All replicas, those that serve several times: the dead ones have little to say."""
        return [slot.url for slot in self._slots for _ in range(8 if slot.serves else 1)]

    async def _kill(self, number: int, slot: Slot) -> None:
        """One life after the other; the last one stays."""
        random = Random(f"{self._seed} slot {number}")
        while self._left > 0:
            self._left -= 1
            slot.start()
            during = random.choices(["starting", "serving", "stopping"], [2, 6, 2])[0]
            if during == "starting":
                await asyncio.sleep(random.uniform(0, _WHILE_STARTING))
            else:
                await slot.ready()
                await asyncio.sleep(random.uniform(0, _WHILE_SERVING))
            if during == "stopping":
                slot.terminate()
                await asyncio.sleep(random.uniform(0, _WHILE_STOPPING))
            self.counts[during] += 1
            self.counts["during a restart of the database"] += self._restarting
            slot.kill()
            self._advance()
        slot.start()
        await slot.ready()

    async def _restart(self, cluster: Cluster) -> None:
        """Crash the database and start it again, now and then."""
        random = Random(f"{self._seed} database")
        while not self._over:
            await asyncio.sleep(random.uniform(*_BETWEEN_RESTARTS))
            if self._over:
                return
            self._restarting = True
            await asyncio.to_thread(cluster.stop, "immediate")
            await asyncio.sleep(random.uniform(0, 0.5))
            await asyncio.to_thread(cluster.start)
            self._restarting = False
            self.counts["restarts of the database"] += 1
