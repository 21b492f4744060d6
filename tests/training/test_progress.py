"""What progress looks like in a log, and on which stream."""

from __future__ import annotations

import pytest

from training import progress
from training.progress import Throughput, progress_bar, track


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, to be set."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_a_minute_and_one_in_the_end(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    terms = "  ".join(f"term_{i} 1.000" for i in range(20))
    with progress_bar() as bar:
        task = bar.add_task("training", total=1200, note="")
        for second in range(1200):
            clock[0] = float(second)
            bar.update(task, advance=1, below=terms)
    written = capsys.readouterr()
    assert written.out == ""
    lines = [line for line in written.err.splitlines() if "training" in line]
    assert len(lines) == 1200 // 60 - 1 + 1
    assert "61/1200" in lines[0]
    assert "1200/1200" in lines[-1]
    assert terms in written.err  # not cut where nobody has to see it in one row


def test_only_the_first_process_shows_any(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(track(range(3), "counting", 3)) == [0, 1, 2]
    assert "counting" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert list(track(range(3), "counting", 3)) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_throughput_is_that_of_the_last_steps(clock: list[float]) -> None:
    speed = Throughput(window=3)
    assert str(speed) == ""
    speed.add(64, 10_000)  # how long the first step took is not known
    assert str(speed) == ""
    clock[0] = 2
    speed.add(4, 300)
    assert str(speed) == "2.0 stays/s  150 hours/s"
    for _ in range(5):
        clock[0] += 2
        speed.add(64, 6000)
    assert str(speed) == "32 stays/s  3,000 hours/s"
