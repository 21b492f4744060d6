"""Programs that the tests of the deployment run; a test skips where one is missing."""

from __future__ import annotations

import contextlib
import io
import shutil
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import httpx
import pytest

from service.__main__ import main
from tests.end_to_end.server import PATIENCE_S, ROOT

DEPLOY = ROOT / "deploy"


def program(name: str) -> str:
    """Its path: in the environment, on the search path, or where Debian keeps servers."""
    own = Path(sys.executable).with_name(name)
    if own.exists():
        return str(own)
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """Run to a success; returns what it said."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, _said(command, done)
    return done.stdout


def _said(command: Sequence[str | Path], done: subprocess.CompletedProcess[str]) -> str:
    return f"{' '.join(map(str, command))} -> {done.returncode}\n{done.stdout}{done.stderr}"


def until(condition: Callable[[], bool]) -> None:
    """Wait for what happens in another process."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not get there"
        time.sleep(0.05)


class Running(ABC):
    """A program in a process of its own. As a context: started and answering, ended after."""

    output: Path
    """What it says, for when it does not start."""
    _process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def command(self) -> list[str]:
        """What to start."""

    @abstractmethod
    def answers(self) -> bool:
        """Whether it is ready. An httpx.TransportError says that it is not."""

    def __enter__(self) -> Self:
        with self.output.open("wb") as output:
            self._process = subprocess.Popen(self.command(), stdout=output, stderr=output)
        try:
            until(self._is_ready)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.wait(PATIENCE_S)

    def _is_ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.output.read_text()
        try:
            return self.answers()
        except httpx.TransportError:
            return False


def check_command(command: Sequence[str]) -> None:
    """Have the service say whether it has this command, and these options of it."""
    assert list(command[:3]) == ["python", "-m", "service"]
    named = [part for part in command[3:] if part.startswith("--")]
    words = command[3 : command.index(named[0]) if named else None]
    told = io.StringIO()
    with contextlib.redirect_stdout(told), pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0
    assert all(option in told.getvalue() for option in named), told.getvalue()
