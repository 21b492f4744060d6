"""Opening the SQLite file of a log: one writing process at a time, its schema up to date."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import apsw

from service.log.base import LogUnavailable
from service.log.migrate import migrate_file, require_known, revision_of_file

MIN_SQLITE = 3_051_003
BUSY_MS = 5_000


def real(path: Path) -> Path:
    """Where a path leads: SQLite puts its other files beside that one, not beside a link to it."""
    return Path(os.path.realpath(path))


class FileLock:
    """An advisory lock on `<path>.lock`: it ends with the process, however that ends.

    SQLite itself lets several processes write in turn; the service holds in memory what it wrote,
    and has to be the only one.
    """

    def __init__(self, path: Path) -> None:
        """Raises LogUnavailable if another process has it, or the file cannot be made."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise LogUnavailable(f"cannot open the log {path}: {error}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Removed between the two, it keeps nobody out.
            if not os.path.samestat(os.fstat(self._file), os.stat(f"{path}.lock")):
                raise FileNotFoundError
        except OSError as error:
            os.close(self._file)
            raise LogUnavailable(f"the log {path} is in use by another process") from error

    def release(self) -> None:
        os.close(self._file)


class OpenFiles:
    """The files of an open log, as they stand under their names.

    SQLite writes on into a file that was moved, removed or replaced, where nobody would find what
    was acknowledged, and lays holes into one that was cut off.
    """

    def __init__(self, path: Path) -> None:
        """Raises LogUnavailable."""
        self._paths = (str(path), f"{path}-wal", f"{path}.lock")
        self._size = 0
        try:
            self._known = self._look()
        except OSError as error:
            raise LogUnavailable(f"cannot open the log {path}: {error}") from error

    def require(self) -> None:
        """Raises OSError unless they are those that were opened. Only a checkpoint changes the size
        of the first, and makes it no smaller.
        """
        if self._look() != self._known:
            raise OSError("a file of the log was replaced or cut off")

    def _look(self) -> list[tuple[int, int]]:
        found = [os.stat(path) for path in self._paths]
        if found[0].st_size < self._size:
            return []
        self._size = found[0].st_size
        return [(file.st_dev, file.st_ino) for file in found]


def make_private(path: Path) -> None:
    """An empty file that its owner alone can read; SQLite makes those beside it alike.

    One that is there stays as it is, and is not opened: to close it would end locks on it that
    other connections of this process hold. Raises OSError.
    """
    with contextlib.suppress(FileExistsError):
        os.close(os.open(os.path.realpath(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))


def open_writer(path: Path, advance: Callable[[], None] = lambda: None) -> apsw.Connection:
    """The connection that writes and checkpoints, its schema up to date; the lock must be held.

    `advance` is called for every row that is written anew for that. Raises LogUnavailable.
    """
    _require_library()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        make_private(path)
        db = apsw.Connection(str(path))
    except (apsw.Error, OSError) as error:
        raise LogUnavailable(f"cannot open the log {path}: {error}") from error
    try:
        db.set_busy_timeout(BUSY_MS)
        if db.pragma("journal_mode", "wal") != "wal":
            raise LogUnavailable(f"the file system of {path} does not support WAL")
        db.pragma("synchronous", "full")
        migrate_file(db, advance)
    except LogUnavailable:
        db.close()
        raise
    except (apsw.Error, OSError) as error:
        db.close()
        raise LogUnavailable(f"cannot open the log {path}: {error}") from error
    return db


def open_reader(path: Path) -> apsw.Connection:
    """A connection that cannot write. Raises LogUnavailable, WrongSchema."""
    _require_library()
    try:
        db = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    except apsw.Error as error:
        raise LogUnavailable(f"cannot open the log {path}: {error}") from error
    try:
        db.set_busy_timeout(BUSY_MS)
        require_known(revision_of_file(db))
    except LogUnavailable:
        db.close()
        raise
    except apsw.Error as error:
        db.close()
        raise LogUnavailable(f"cannot open the log {path}: {error}") from error
    return db


def _require_library() -> None:
    if apsw.SQLITE_VERSION_NUMBER < MIN_SQLITE or _library_version() < MIN_SQLITE:
        raise LogUnavailable(
            f"SQLite {apsw.sqlite_lib_version()} is too old: 3.51.3 or later is needed"
        )


def _library_version() -> int:
    major, minor, patch = (int(part) for part in apsw.sqlite_lib_version().split("."))
    return major * 1_000_000 + minor * 1_000 + patch
