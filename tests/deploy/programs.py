"""Programs that the tests of the deployment run; a test skips where one is missing."""

from __future__ import annotations

import contextlib
import io
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

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
