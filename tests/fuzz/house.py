"""What every fuzz test uses: how many examples, a running service, what an answer may never be."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
from hypothesis import HealthCheck, settings

from service.api.problems import MEDIA_TYPE, PROBLEMS
from tests.service.fakes import Client, running

_T = TypeVar("_T")
_E = TypeVar("_E", bound=Exception)

FACTOR = int(os.environ.get("LLM4EHR_TEST_FUZZ", "1"))
"""1 for `make test`: few examples, always the same. `make fuzz` sets a larger one: other examples
every time.
"""

MARK = "cAnArY"
"""Stands in every text that is made up: no error may repeat it."""

MAX_PROBLEM_BYTES = 20_000
MAX_ITEM_BYTES = 600
"""Of an answer that is a problem, besides its items, and of each of these."""

TRIED: Counter[str] = Counter()
"""Examples by test, and requests."""


def examples(n: int) -> settings:
    """Settings of a property that is tried with `n` examples in `make test`."""
    return settings(
        max_examples=n * FACTOR,
        deadline=None,
        derandomize=FACTOR == 1,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


def attempt(kind: type[_E] | tuple[type[_E], ...], call: Callable[[], _T]) -> _T | _E:
    """What a call gives, or the error of that kind that it raises; any other passes through."""
    try:
        return call()
    except kind as error:
        return error


def tried(what: str) -> None:
    """Count one example."""
    TRIED[what] += 1


class Asked:
    """A running service with a fake engine, asked without await."""

    def __init__(self, runner: asyncio.Runner, client: Client) -> None:
        self.client = client
        self._runner = runner

    def request(
        self, method: str, path: str, *, may_be: Sequence[str] = (), **what: Any
    ) -> httpx.Response:
        """Ask, and hold the answer against what is promised of every answer.

        `may_be` names problems of the service's that are meant to be possible.
        """
        TRIED["requests"] += 1
        response = self.run(self.client.http.request(method, path, **what))
        assert_fair(response, may_be)
        return response

    def run(self, coroutine: Any) -> Any:
        """Run a coroutine on the loop of the service."""
        return self._runner.run(coroutine)

    def rows(self) -> int:
        """How many entries the log holds."""
        return int(self.run(self._rows()))

    async def _rows(self) -> int:
        return sum((await self.client.log.heads()).values())


@contextmanager
def asked(folder: Path, **settings: Any) -> Iterator[Asked]:
    """A service on a log in the folder."""
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        client = runner.run(stack.enter_async_context(running(folder / "log.sqlite", **settings)))
        try:
            yield Asked(runner, client)
        finally:
            runner.run(stack.aclose())


def assert_fair(response: httpx.Response, may_be: Sequence[str] = ()) -> None:
    """An answer, or a problem that is in the table and repeats nothing that was sent."""
    fault = response.json()["type"] if response.status_code >= 500 else None
    assert fault in (None, *(f"/problems/{name}" for name in may_be)), response.text
    if response.status_code < 400:
        return
    n_items = len(response.json().get("items", ()))
    assert len(response.content) <= MAX_PROBLEM_BYTES + n_items * MAX_ITEM_BYTES
    problem = response.json()
    for item in problem.get("items", ()):
        del item["item_id"]  # by which the client knows its own item
    assert MARK not in str(problem)
    if response.request.url.path.startswith("/v2"):
        assert set(problem) == {"error"}
        return
    assert response.headers["content-type"] == MEDIA_TYPE
    name = problem["type"].removeprefix("/problems/")
    assert (response.status_code, problem["title"]) == PROBLEMS[name]
