"""Counts what was tried, also over several processes, and says it at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from tests.fuzz.house import TRIED

_KEY = "fuzz-tried"


@pytest.fixture(autouse=True)
def _counted(request: pytest.FixtureRequest) -> Iterator[None]:
    """Hands what a test tried to its report."""
    before = Counter(TRIED)
    yield
    request.node.user_properties.append((_KEY, dict(TRIED - before)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    total: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) == "teardown":
                for key, value in report.user_properties:
                    total.update(value if key == _KEY else {})
    if total:
        terminalreporter.section("fuzzed")
        for what, n in sorted(total.items()):
            terminalreporter.write_line(f"{n:>9} {what}")
