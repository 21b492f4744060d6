"""A way to PostgreSQL that can be slow, stall, or be cut."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable
from random import Random
from types import TracebackType
from typing import Literal

Mode = Literal["open", "stalled", "cut"]

# As they stand in PostgreSQL's protocol: rows were inserted; a transaction waits for what follows;
# it is committed.
_INSERTED, _WAITS, _COMMITTED = b"INSERT 0 ", b"Z\0\0\0\x05T", b"COMMIT\0"


class Proxy:
    """Passes bytes between a port of its own and another one, on a thread of its own.

    Stalled it passes nothing and closes nothing; cut it closes what there is, and what comes.
    """

    def __init__(self, target: int, *, lost_commits: float = 0.0, seed: int = 0) -> None:
        """`lost_commits` is the share of commits during which the connection is cut."""
        self.port = 0
        self.delay_s = 0.0
        """How long each piece is held up, in either direction."""
        self.lost: Counter[str] = Counter()
        """Commits "before" which and "after" which the connection was cut."""
        self._lost_commits = lost_commits
        self._random = Random(seed)
        self._target = target
        self._mode: Mode = "open"
        self._flows = asyncio.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> Proxy:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result(10)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def turn(self, mode: Mode) -> None:
        asyncio.run_coroutine_threadsafe(self._turn(mode), self._loop).result(10)

    async def _open(self) -> None:
        self._flows.set()
        self._server = await asyncio.start_server(self._pass, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        self._server.close()
        tasks = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _turn(self, mode: Mode) -> None:
        self._mode = mode
        if mode == "stalled":
            self._flows.clear()
            return
        self._flows.set()
        if mode == "cut":
            for writer in self._writers:
                writer.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._mode == "cut":
            writer.transport.abort()
            return
        try:
            beyond, onward = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        pair = {writer, onward}
        self._writers |= pair
        commits = _Commits(self._lost_commits, self._random, self.lost)
        try:
            await asyncio.gather(
                self._copy(reader, onward, commits.cut_before),
                self._copy(beyond, writer, commits.cut_after),
            )
        except OSError:
            pass  # one side is gone, and the other one follows
        finally:
            self._writers -= pair
            for end in pair:
                end.transport.abort()

    async def _copy(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        is_lost: Callable[[bytes], bool],
    ) -> None:
        while piece := await reader.read(1 << 16):
            if is_lost(piece):
                raise ConnectionAbortedError
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            await self._flows.wait()
            writer.write(piece)
            await writer.drain()
        writer.transport.abort()


class _Commits:
    """Watches one connection, and has it cut before the server hears of a commit, or before its
    client hears that it is done.
    """

    def __init__(self, share: float, random: Random, lost: Counter[str]) -> None:
        self._share = share
        self._random = random
        self._lost = lost
        self._inserted = self._next = self._swallow = False

    def cut_before(self, piece: bytes) -> bool:
        """Whether this piece of the client's is never to arrive."""
        if not self._next:
            return False
        self._inserted = self._next = False
        drawn = self._random.random() / self._share if self._share else 1
        self._swallow = 0.5 <= drawn < 1
        self._lost["before"] += drawn < 0.5
        return drawn < 0.5

    def cut_after(self, piece: bytes) -> bool:
        """Whether this piece of the server's is never to arrive."""
        self._inserted |= _INSERTED in piece
        self._next = self._inserted and piece.endswith(_WAITS)
        lost = self._swallow and _COMMITTED in piece
        self._lost["after"] += lost
        return lost
