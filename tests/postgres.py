"""A PostgreSQL for the tests: a cluster of its own for each process of pytest, a database for each
test. `LLM4EHR_TEST_POSTGRES` names the URL of another server's superuser to use instead.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest

from service.log.migrate import migrate_postgres
from tests.end_to_end.server import free_port

_VERSIONS = Path("/usr/lib/postgresql")
# What runs it when the tests run as root, which PostgreSQL refuses.
_USER = "postgres"
_TEMPLATE = f"migrated_{uuid.uuid4().hex}"  # several processes may share a server


class Cluster:
    """One PostgreSQL server on a port of the loopback interface; its superuser is `postgres`."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self.port = free_port()
        self._programs = programs
        self._folder = folder
        self._data = folder / "data"
        if os.geteuid() == 0:
            user = pwd.getpwnam(_USER)
            os.chown(folder, user.pw_uid, user.pw_gid)
        self._run("initdb", "-D", self._data, "-U", "postgres", "-A", "trust", "-E", "UTF8",
                  "--no-locale", "--no-sync")  # fmt: skip
        self.start()

    @property
    def server(self) -> str:
        """The URL without a database."""
        return f"postgresql://postgres@127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the server and wait until it answers."""
        options = (
            f"-p {self.port} -c listen_addresses=127.0.0.1 -k {self._folder}"
            " -c shared_buffers=32MB -c max_connections=200"
        )
        self._run("pg_ctl", "-D", self._data, "-w", "-s", "-t", "60", "-o", options,
                  "-l", self._folder / "server.log", "start")  # fmt: skip

    def stop(self, mode: str = "immediate") -> None:
        """Stop the server: "immediate" as by a crash, "fast" in order."""
        self._run("pg_ctl", "-D", self._data, "-w", "-s", "-m", mode, "stop")

    def pause(self) -> None:
        """Have no process of it do anything more, its connections held: a server that hangs."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def require(self) -> None:
        """Have it run, whatever a test that failed did to it."""
        try:
            self.resume()
            psycopg.connect(f"{self.server}/postgres", connect_timeout=10).close()
        except (OSError, psycopg.Error):
            self.start()

    def _signal(self, number: signal.Signals) -> None:
        main = int((self._data / "postmaster.pid").read_text().splitlines()[0])
        children = Path(f"/proc/{main}/task/{main}/children").read_text().split()
        for process in [main, *map(int, children)]:
            with suppress(ProcessLookupError):  # it ended meanwhile
                os.kill(process, number)

    def _run(self, program: str, *arguments: object) -> None:
        command: Sequence[str] = [str(self._programs / program), *map(str, arguments)]
        if os.geteuid() == 0:
            command = ["setpriv", "--reuid", _USER, "--regid", _USER, "--clear-groups", *command]
        subprocess.run(
            command, check=True, cwd=self._folder, stdout=subprocess.DEVNULL, timeout=120
        )


def _programs() -> Path | None:
    """The folder of the newest PostgreSQL that is installed."""
    found = sorted(_VERSIONS.glob("*/bin"), key=lambda path: float(path.parent.name))
    if found:
        return found[-1]
    program = shutil.which("initdb")
    return None if program is None else Path(program).resolve().parent


@pytest.fixture(scope="session")
def postgres() -> Iterator[Cluster]:
    """A server of its own that a test may stop, pause and start again, as long as it runs in the
    end.
    """
    if (programs := _programs()) is None:
        pytest.skip("PostgreSQL is not installed (Debian: postgresql)")
    # Not beneath pytest's folders, which another user may not enter; and the path of the socket
    # must be short.
    with tempfile.TemporaryDirectory(prefix="llm4ehr-pg-") as folder:
        cluster = Cluster(programs, Path(folder))
        try:
            yield cluster
        finally:
            cluster.stop()


@pytest.fixture(scope="session")
def postgres_server(request: pytest.FixtureRequest) -> Iterator[str]:
    """URL of a PostgreSQL server, without a database; it has a template of a migrated one."""
    named = os.environ.get("LLM4EHR_TEST_POSTGRES")
    server = str(named or request.getfixturevalue("postgres").server)
    _execute(server, f"CREATE DATABASE {_TEMPLATE} ENCODING 'UTF8' TEMPLATE template0")
    migrate_postgres(f"{server}/{_TEMPLATE}")
    yield server
    _execute(server, f"DROP DATABASE {_TEMPLATE}")


@pytest.fixture
def empty_postgres_url(postgres_server: str) -> Iterator[str]:
    """A database of this test's own, without a table."""
    yield from new_database(postgres_server, "template0")


@pytest.fixture
def postgres_url(postgres_server: str) -> Iterator[str]:
    """A database of this test's own with the schema of the log, empty."""
    yield from new_database(postgres_server)


def new_database(server: str, template: str = _TEMPLATE) -> Iterator[str]:
    """URL of a database that is dropped in the end, by default with the schema of the log."""
    name = f"test_{uuid.uuid4().hex}"
    _execute(server, f"CREATE DATABASE {name} TEMPLATE {template}")
    yield f"{server}/{name}"
    _execute(server, f"DROP DATABASE {name} WITH (FORCE)")


def _execute(server: str, statement: str) -> None:
    with psycopg.connect(f"{server}/postgres", autocommit=True) as db:
        db.execute(statement)
