"""Who computes next where several engines share one processor. No torch, no clock.

The engine in front (that of the model that answers) goes first. The others compute when it has
nothing to do; while it is busy they get one turn after every `SHARE` of its own, so that they are
slow but never stand still. Among themselves they go in the order in which they asked.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SHARE = 8
"""Turns of the engine in front for one of the others, while both have work."""

# The engine in front does not say when it runs out of work: those who wait look again this often.
_LOOK_AGAIN_S = 0.002


class Turns:
    """One turn at a time. Safe from any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._taken = False
        self._front: object = None
        self._busy: Callable[[], bool] = lambda: False
        self._waiting: deque[object] = deque()  # first come first
        self._since = 0  # turns of the front since the last of another one

    def put_in_front(self, engine: object, busy: Callable[[], bool]) -> None:
        """From now on `engine` goes first while it is `busy`, which is asked from any thread."""
        with self._changed:
            self._front, self._busy, self._since = engine, busy, 0
            self._changed.notify_all()

    def is_in_front(self, engine: object) -> bool:
        """Whether `engine` is the one that goes first."""
        return engine is self._front

    @contextmanager
    def turn(self, engine: object) -> Iterator[None]:
        """Wait for a turn of `engine` and hold it."""
        with self._changed:
            self._waiting.append(engine)
            while not self._may(engine):
                self._changed.wait(None if self._taken else _LOOK_AGAIN_S)
            self._waiting.remove(engine)
            self._taken = True
            waited_for = engine is self._front and bool(self._waiting)
            self._since = self._since + 1 if waited_for else 0
        try:
            yield
        finally:
            with self._changed:
                self._taken = False
                self._changed.notify_all()

    def _may(self, engine: object) -> bool:
        if self._taken:
            return False
        others = [other for other in self._waiting if other is not self._front]
        theirs = self._since >= SHARE
        if engine is self._front:
            return not (theirs and others)
        return others[0] is engine and (theirs or not self._busy())
