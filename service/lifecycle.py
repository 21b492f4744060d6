"""Whether the service is about to stop. Set by the server, read by health and by every answer."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass(slots=True)
class Lifecycle:
    """One for each app."""

    draining: bool = False
    """Told to stop: still answers, but says that it is not ready and keeps no connection."""

    started: float = field(default_factory=time.monotonic)

    @property
    def uptime_s(self) -> float:
        return time.monotonic() - self.started
