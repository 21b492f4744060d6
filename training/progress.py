"""Progress with counts, elapsed time and ETA: bars on a terminal, now and then a line in a log.

It goes to the standard error stream, so that what a command prints can be read by another.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

T = TypeVar("T")

_LINE_EVERY = 60.0  # seconds, where there is no terminal
_CONSOLE = Console(stderr=True)  # one for all, so that bars may stand below one another


class _Bars(Progress):
    """Bars, and what is long below them (`below` of a task); without a terminal a line a minute."""

    _last_line = 0.0

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bars, then what stands below, in the full width and cut at its end."""
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if below := task.fields.get("below"):
                yield Text(below, no_wrap=True, overflow="ellipsis")

    def start(self) -> None:
        """Begin to draw."""
        self._last_line = time.monotonic()
        super().start()

    def update(self, task_id: TaskID, *args: Any, **fields: Any) -> None:
        """As `Progress.update`."""
        super().update(task_id, *args, **fields)
        self._write_line()

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """As `Progress.advance`."""
        super().advance(task_id, advance)
        self._write_line()

    def _write_line(self) -> None:
        due = time.monotonic() - self._last_line >= _LINE_EVERY
        if self.disable or self.console.is_terminal or not due:
            return
        self._last_line = time.monotonic()
        for renderable in self.get_renderables():
            self.console.print(renderable, soft_wrap=isinstance(renderable, Text))


def progress_bar(*, disable: bool = False) -> Progress:
    """The one look of all progress bars. Only the first of several processes shows any."""
    return _Bars(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=_CONSOLE,
        speed_estimate_period=600,
        disable=disable or int(os.environ.get("RANK", 0)) > 0,
    )


def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Yield the items under a progress bar."""
    with progress_bar() as bar:
        task = bar.add_task(description, total=total, note="")
        for item in items:
            yield item
            bar.advance(task)


class Throughput:
    """Stays and hours a second over the last steps."""

    def __init__(self, window: int = 50) -> None:
        self._steps: deque[tuple[float, int, int]] = deque(maxlen=window + 1)

    def add(self, stays: int, hours: int) -> None:
        """Note a step that ends now."""
        self._steps.append((time.monotonic(), stays, hours))

    def __str__(self) -> str:
        """Empty until two steps have been made."""
        if len(self._steps) < 2:
            return ""
        first, *after = self._steps
        seconds = max(after[-1][0] - first[0], 1e-9)
        stays, hours = (sum(step[i] for step in after) / seconds for i in (1, 2))
        return f"{stays:.{0 if stays >= 10 else 1}f} stays/s  {hours:,.0f} hours/s"
