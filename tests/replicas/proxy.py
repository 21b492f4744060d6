"""A way to PostgreSQL that can be slow, stall, or be cut."""

from __future__ import annotations

import asyncio
import threading
from types import TracebackType
from typing import Literal

Mode = Literal["open", "stalled", "cut"]


class Proxy:
    """Passes bytes between a port of its own and another one, on a thread of its own.

    Stalled it passes nothing and closes nothing; cut it closes what there is, and what comes.
    """

    def __init__(self, target: int) -> None:
        self.port = 0
        self.delay_s = 0.0
        """How long each piece is held up, in either direction."""
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
        try:
            await asyncio.gather(self._copy(reader, onward), self._copy(beyond, writer))
        except OSError:
            pass  # one side is gone, and the other one follows
        finally:
            self._writers -= pair
            for end in pair:
                end.transport.abort()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(1 << 16):
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            await self._flows.wait()
            writer.write(piece)
            await writer.drain()
        writer.transport.abort()
