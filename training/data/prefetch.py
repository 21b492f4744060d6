"""Read ahead: the next item is made in a thread while the present one is used."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from queue import Queue
from typing import TypeVar

T = TypeVar("T")
_END = object()


def prefetch(items: Iterator[T]) -> Iterator[T]:
    """The same items in the same order, one made ahead of time.

    An error of the source is raised where its item would have been. Memory holds three items at
    most: the one in use, the one that waits and the one that is made.
    """
    queue: Queue[object] = Queue(maxsize=1)
    stopped = threading.Event()

    def make() -> None:
        try:
            for item in items:
                if stopped.is_set():
                    return
                queue.put(item)
            queue.put(_END)
        except BaseException as error:
            queue.put(error)

    worker = threading.Thread(target=make, name="prefetch", daemon=True)
    worker.start()
    try:
        while (item := queue.get()) is not _END:
            if isinstance(item, BaseException):
                raise item
            yield item  # type: ignore[misc]
    finally:
        stopped.set()
        while worker.is_alive():  # it may be waiting for room
            if not queue.empty():
                queue.get_nowait()
            worker.join(0.01)
