"""Engines that share a processor: the one in front goes first, the others never stand still."""

from __future__ import annotations

import threading
from collections.abc import Callable

from service.engine.turns import SHARE, Turns

PATIENCE_S = 60


class Worker(threading.Thread):
    """Takes a number of turns, and writes its name down in each."""

    def __init__(self, turns: Turns, name: str, n: int, done: list[str]) -> None:
        super().__init__(name=name, daemon=True)
        self._turns, self._n, self._done = turns, n, done

    def run(self) -> None:
        for _ in range(self._n):
            with self._turns.turn(self.name):
                self._done.append(self.name)


def in_order(front: str | None, busy: Callable[[list[str]], bool], **turns_of: int) -> list[str]:
    """Who got the turns, all having asked for their first before any was given."""
    turns, done = Turns(), list[str]()
    workers = [Worker(turns, name, n, done) for name, n in turns_of.items()]
    with turns.turn("nobody"):
        turns.put_in_front(front, lambda: busy(done))
        for worker in workers:
            worker.start()
            while worker.name not in turns._waiting:
                pass
    for worker in workers:
        worker.join(PATIENCE_S)
        assert not worker.is_alive()
    return done


def test_the_front_goes_first_and_leaves_a_share() -> None:
    def more(done: list[str]) -> bool:
        return done.count("live") < 3 * SHARE

    done = in_order("live", more, rebuild=5, live=3 * SHARE)
    # One of the others at most after every share of the front, then what is left.
    assert done[:SHARE] == ["live"] * SHARE
    last = len(done) - 1 - done[::-1].index("live")
    assert 1 <= done[:last].count("rebuild") <= 3
    assert sorted(done) == ["live"] * 3 * SHARE + ["rebuild"] * 5


def test_others_wait_while_the_front_is_busy_and_go_when_it_is_not() -> None:
    turns, done = Turns(), list[str]()
    busy = threading.Event()
    busy.set()
    turns.put_in_front("live", busy.is_set)
    worker = Worker(turns, "rebuild", 2, done)
    worker.start()
    for _ in range(SHARE - 1):
        with turns.turn("live"):
            assert not done
    busy.clear()
    worker.join(PATIENCE_S)
    assert done == ["rebuild"] * 2


def test_without_work_in_front_the_others_go_in_the_order_they_asked() -> None:
    assert in_order("live", lambda done: False, a=1, b=1, c=1) == ["a", "b", "c"]


def test_a_turn_ends_with_an_error_too() -> None:
    turns = Turns()
    for _ in range(2):
        try:
            with turns.turn("a"):
                raise RuntimeError
        except RuntimeError:
            pass


def test_another_engine_may_come_to_the_front() -> None:
    turns, done = Turns(), list[str]()
    turns.put_in_front("a", lambda: True)
    worker = Worker(turns, "b", 1, done)
    worker.start()
    turns.put_in_front("b", lambda: True)
    worker.join(PATIENCE_S)
    assert done == ["b"]
