"""The audit trail in front of a log that is well, slow, or away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import cast

import pytest
from prometheus_client import CollectorRegistry

from service.log.base import EventLog, LogUnavailable, Unconfirmed
from service.trail import keeper
from service.trail.keeper import Trail
from service.trail.record import Action, AuditRecord

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has to pass in these tests passes soon."""
    for name in ("PATIENCE_S", "_TRY_AGAIN_S", "_FLUSH_S"):
        monkeypatch.setattr(keeper, name, 0.02)


class Ledger:
    """The part of a log that takes lines of the audit trail."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.groups: list[int] = []
        self.error: Exception | None = None
        self.written_before_the_error = False
        self.open = asyncio.Event()
        self.open.set()

    async def record(self, records: Sequence[AuditRecord]) -> None:
        await self.open.wait()
        if self.error is not None and not self.written_before_the_error:
            raise self.error
        self.groups.append(len(records))
        self.lines += [record.request_id for record in records]
        if self.error is not None:
            raise self.error


def line(name: object, action: Action = "read") -> AuditRecord:
    return AuditRecord(
        at_us=0, principal="ward-7", method="api-key", operation="getRisk", action=action,
        episodes=("e",), outcome="success", request_id=str(name), address="",
    )  # fmt: skip


class House:
    def __init__(self) -> None:
        self.ledger = Ledger()
        self.registry = CollectorRegistry()
        self.now = 0.0
        self.trail = Trail(cast(EventLog, self.ledger), self.registry, lambda: self.now)

    def metric(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"llm4ehr_audit_{name}", labels)

    async def until(self, n: int) -> None:
        """So many lines are written."""
        async with asyncio.timeout(30):
            while len(self.ledger.lines) < n or self.metric("waiting"):  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.001)


@asynccontextmanager
async def housed() -> AsyncIterator[House]:
    house = House()
    house.trail.start()
    try:
        yield house
    finally:
        await house.trail.stop()


async def test_a_line_is_written_when_it_returns() -> None:
    async with housed() as house:
        for name in "abc":
            await house.trail.write(line(name))
            assert house.ledger.lines[-1] == name
        await house.trail.write(line("d", "execute"))
        assert house.metric("records_total", action="read") == 3
        assert house.metric("records_total", action="execute") == 1
        assert house.metric("waiting") == 0


@pytest.mark.parametrize("error", [LogUnavailable("away"), Unconfirmed("perhaps")])
async def test_without_a_log_lines_wait_and_are_written_in_order(error: Exception) -> None:
    async with housed() as house:
        house.ledger.error = error
        for name in range(600):
            await house.trail.write(line(name))
        assert house.ledger.lines == []
        assert house.metric("waiting") == 600
        house.ledger.error = None
        await house.until(600)
        assert house.ledger.lines == [str(name) for name in range(600)]
        assert max(house.ledger.groups) > 1
        assert house.metric("records_total", action="read") == 600
        await house.trail.write(line("after"))
        assert house.ledger.lines[-1] == "after"
        assert house.metric("lost_total") == 0


async def test_a_line_that_may_be_written_is_written_again() -> None:
    async with housed() as house:
        house.ledger.error, house.ledger.written_before_the_error = Unconfirmed("perhaps"), True
        await house.trail.write(line("a"))
        house.ledger.error = None
        await house.until(2)
        assert set(house.ledger.lines) == {"a"}


async def test_a_slow_log_holds_an_answer_no_longer_than_its_patience() -> None:
    async with housed() as house:
        house.ledger.open.clear()
        async with asyncio.timeout(30):
            await house.trail.write(line("a"))
            assert house.metric("waiting") == 1
            # While one is late the others do not wait for the log at all.
            for name in "bcd":
                await house.trail.write(line(name))
        assert house.metric("waiting") == 4
        house.ledger.open.set()
        await house.until(4)
        assert sorted(house.ledger.lines) == ["a", "b", "c", "d"]


async def test_memory_is_bounded_and_what_is_lost_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(keeper, "MAX_WAITING", 3)
    async with housed() as house:
        house.ledger.error = LogUnavailable("away")
        for name in range(5):
            await house.trail.write(line(name))
        assert (house.metric("waiting"), house.metric("lost_total")) == (3, 2)
        house.ledger.error = None
        await house.until(3)
        assert house.ledger.lines == ["0", "1", "2"]


async def test_a_line_that_cannot_be_written_does_not_stand_in_the_way_of_others() -> None:
    async with housed() as house:
        house.ledger.error = ValueError("not text")
        await house.trail.write(line("a"))
        house.ledger.error = None
        await house.trail.write(line("b"))
        assert house.ledger.lines == ["b"]
        assert house.metric("lost_total") == 1


async def test_lost_lines_are_told_of_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    async with housed() as house:
        house.ledger.error = ValueError("not text")
        for step in (0, 1, 0, 0, keeper.SAY_AGAIN_S, 0):
            house.now += step
            await house.trail.write(line("a"))
        assert house.metric("lost_total") == 6
    told = [r.getMessage().partition(" ")[0] for r in caplog.records if r.levelname == "ERROR"]
    assert told == ["1", "4", "1"]


async def test_who_goes_away_leaves_the_line() -> None:
    async with housed() as house:
        house.ledger.open.clear()
        writing = asyncio.create_task(house.trail.write(line("a")))
        await asyncio.sleep(0)
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        house.ledger.open.set()
        await house.until(1)


@pytest.mark.parametrize("log", ["well", "away", "hangs"])
async def test_the_end_writes_what_it_can(log: str) -> None:
    house = House()
    house.trail.start()
    house.ledger.error = LogUnavailable("away")
    for name in "abc":
        await house.trail.write(line(name))
    if log == "well":
        house.ledger.error = None
    if log == "hangs":
        house.ledger.open.clear()
    await house.trail.stop()
    well = log == "well"
    assert house.ledger.lines == (["a", "b", "c"] if well else [])
    assert house.metric("lost_total") == (0 if well else 3)


async def test_nothing_is_left_running() -> None:
    before = asyncio.all_tasks()
    async with housed() as house:
        await house.trail.write(line("a"))
        assert asyncio.all_tasks() > before
    assert asyncio.all_tasks() == before
