"""What one connection may ask of the server, over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvicorn

from service import http_protocol, server
from service.http_protocol import HEADERS_S, MAX_HEADER_BYTES, HttpProtocol
from service.settings import Settings
from tests.service.fakes import running

pytestmark = pytest.mark.anyio

GET = b"GET / HTTP/1.1\r\nHost: x\r\n"
POST = b"POST / HTTP/1.1\r\nHost: x\r\n"
PATIENCE_S = 60.0
"""Bounds every wait: far more than anything takes."""


async def answer(scope, receive, send) -> None:  # type: ignore[no-untyped-def]
    """Reads bodies of POST alone, and says how long they were."""
    n = 0
    while scope["method"] == "POST":
        message = await receive()
        n += len(message.get("body", b""))
        if not message.get("more_body"):
            break
    body = b"%d" % n
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def listening(protocol: Callable[[], HttpProtocol]) -> AsyncIterator[int]:
    listener = await asyncio.get_running_loop().create_server(protocol, "127.0.0.1", 0)
    try:
        yield listener.sockets[0].getsockname()[1]
    finally:
        listener.close()


@asynccontextmanager
async def small(keep_alive_s: int = 1000) -> AsyncIterator[int]:
    """A port at which an application answers that does nothing."""
    config = uvicorn.Config(
        answer, timeout_keep_alive=keep_alive_s, lifespan="off", ws="none", log_config=None
    )
    config.load()
    state = uvicorn.server.ServerState()

    def protocol() -> HttpProtocol:
        return HttpProtocol(config=config, server_state=state, app_state={})

    async with listening(protocol) as port:
        yield port


async def said(port: int, *parts: bytes) -> bytes:
    """All that is answered until the server closes the connection."""
    async with asyncio.timeout(PATIENCE_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        got = b""
        try:
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0.001)
            got = await reader.read()
        except ConnectionError:
            pass  # it did not wait for the rest of what we sent
        finally:
            writer.close()
        return got


async def send_until_closed(port: int, first: bytes, again: bytes) -> None:
    """Send without an end, until the server has closed the connection."""
    async with asyncio.timeout(PATIENCE_S):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(first)
        try:
            while True:
                writer.write(again)
                await writer.drain()
                await asyncio.sleep(0.001)
        except ConnectionError:
            writer.close()


def header(n: int) -> bytes:
    return b"X: " + b"a" * n + b"\r\n"


@pytest.mark.parametrize(
    "parts",
    [
        [GET, header(MAX_HEADER_BYTES), b"\r\n"],
        [GET + header(MAX_HEADER_BYTES) + b"\r\n"],
        [GET, *[header(1000)] * 70, b"\r\n"],
        [GET + header(1000) * 70 + b"\r\n"],
        [b"GET /", b"a" * MAX_HEADER_BYTES, b" HTTP/1.1\r\n\r\n"],
        [GET, b"X: ", *[b"a" * 1000] * 70],  # and it does not end
        [GET + b"\r\n", GET, *[header(1000)] * 70],
    ],
)
async def test_headers_are_bounded(anyio_backend: str, parts: list[bytes]) -> None:
    async with small() as port:
        got = await said(port, *parts)
    # Who goes on to send may find the connection gone before he reads why.
    assert got == b"" or b"431 Request" in got


async def test_who_sends_one_byte_too_many_is_told_why(anyio_backend: str) -> None:
    async with small() as port:
        got = await said(port, GET + b"X: ", b"a" * (MAX_HEADER_BYTES + 1 - len(GET) - 3))
    assert got.startswith(b"HTTP/1.1 431 Request Header Fields Too Large")


@pytest.mark.parametrize("part", [header(1000), b"a" * 1000])
async def test_no_more_is_read_of_them(anyio_backend: str, part: bytes) -> None:
    """Of what is sent without an end the server takes what sockets hold, and no more."""
    async with small() as port:
        await send_until_closed(port, GET + b"X: ", part * 64)


async def test_what_else_the_parser_keeps_is_bounded(anyio_backend: str) -> None:
    chunked = POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n"
    async with small() as port:
        await send_until_closed(port, chunked, header(1000))
        await send_until_closed(port, chunked + b"X: ", b"a" * 1000)


@pytest.mark.parametrize(
    ("parts", "bodies"),
    [
        ([GET + b"Connection: close\r\n\r\n"], [b"0"]),
        ([GET, header(60_000), b"Connection: close\r\n\r\n"], [b"0"]),
        ([bytes([c]) for c in GET + b"Connection: close\r\n\r\n"], [b"0"]),
        ([(GET + b"\r\n") * 3000 + GET + b"Connection: close\r\n\r\n"], [b"0"] * 3001),
        (
            [
                POST + b"Connection: close\r\nContent-Length: 1000000\r\n\r\n",
                *[b"a" * 100_000] * 10,
            ],
            [b"1000000"],
        ),
        (
            [
                POST + b"Content-Length: 200000\r\n\r\n" + b"a" * 200_000 + GET,
                header(60_000) + b"Connection: close\r\n\r\n",
            ],
            [b"200000", b"0"],
        ),
    ],
)
async def test_what_is_no_header_is_not_counted(
    anyio_backend: str, parts: list[bytes], bodies: list[bytes]
) -> None:
    async with small() as port:
        got = await said(port, *parts)
    answers = got.split(b"HTTP/1.1 200 OK")[1:]
    assert [one.rpartition(b"\r\n\r\n")[2] for one in answers] == bodies


@pytest.mark.parametrize(
    ("parts", "answers"),
    [
        ([], 0),
        ([b"G"], 0),
        ([GET, b"X: a"], 0),
        ([GET + b"\r\n", b"G"], 1),
        ([GET + b"Content-Length: 100\r\n\r\n", b"a"], 1),  # answered before the body is there
    ],
)
async def test_headers_that_do_not_come_are_not_waited_for(
    anyio_backend: str, monkeypatch: pytest.MonkeyPatch, parts: list[bytes], answers: int
) -> None:
    monkeypatch.setattr(http_protocol, "HEADERS_S", 0.2)
    async with small() as port:
        got = await said(port, *parts)
    assert got.count(b"HTTP/1.1 200 OK") == answers


async def test_a_drip_does_not_help(anyio_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEADERS_S", 0.2)
    async with small() as port:
        await send_until_closed(port, GET, b"X: a\r\n")


async def test_an_idle_connection_is_closed(anyio_backend: str) -> None:
    async with small(keep_alive_s=0) as port:
        for begun in (b"", GET):
            assert (await said(port, GET + b"\r\n" + begun)).count(b"200 OK") == 1


async def test_an_answer_may_take_longer_than_headers(
    anyio_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_protocol, "HEADERS_S", 0.05)
    async with small() as port:
        head = POST + b"Connection: close\r\nContent-Length: 20\r\n\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head)
        for _ in range(20):
            await asyncio.sleep(0.01)
            writer.write(b"a")
        assert b"200 OK" in await asyncio.wait_for(reader.read(), PATIENCE_S)
        writer.close()


def test_the_limits_are_what_the_documents_say() -> None:
    text = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    assert f"{MAX_HEADER_BYTES // 1024} KiB" in text
    assert f"{HEADERS_S:.0f} seconds" in text


async def test_who_comes_when_it_is_full_is_told_so(log_path: Path, anyio_backend: str) -> None:
    async with running(log_path) as client:
        config = server.Server(
            client.app,
            Settings(max_connections=2),
            asyncio.Event(),  # type: ignore[arg-type]
        ).config
        config.load()
        state = uvicorn.server.ServerState()

        def protocol() -> HttpProtocol:
            return config.http_protocol_class(config=config, server_state=state, app_state={})

        async with listening(protocol) as port:
            here = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
            get = b"GET /episodes HTTP/1.1\r\nHost: x\r\n\r\n"
            got = await said(port, get)
            assert b"503 Service Unavailable" in got
            assert b"/problems/too-many-connections" in got
            assert b"retry-after: 1" in got
            health = b"GET /v2/health/ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
            assert b"200 OK" in await said(port, health)
            # Who was there before is served.
            for reader, writer in here:
                writer.write(get)
                assert b"200 OK" in await reader.readline()
            metrics = (await client.http.get("/metrics")).text
            assert 'llm4ehr_refusals_total{reason="too-many-connections"} 1.0' in metrics
            for _, writer in here:
                writer.close()
