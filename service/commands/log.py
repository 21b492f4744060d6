"""log: what is done with the log while the service runs, or before it does."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, date, datetime
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from service.commands.parsers import Commands
from service.log import backup, retention
from service.log.migrate import SCHEMA, migrate_postgres
from service.log.sqlite_file import FileLock, open_writer, real
from service.log.tables import CHAINED, SqliteTables, Tables, open_tables
from service.log.verify import Finding, read_anchors, retired_heads, verify, write_anchors
from service.settings import Settings


def add(commands: Commands) -> None:
    """`log`."""
    log = commands.add_parser("log", help="look after the log that the settings name")
    verbs = log.add_subparsers(required=True)

    migrate = verbs.add_parser("migrate", help="bring the log to the schema of this version")
    migrate.add_argument(
        "--grant", metavar="ROLE", help="let this role of PostgreSQL do what the service does"
    )
    migrate.set_defaults(run_command=_migrate)

    check = verbs.add_parser(
        "verify", help="compute every hash again; status 1 and a JSON object a finding"
    )
    check.add_argument("--anchors", type=Path, action="append", default=[], help="from `anchor`")
    check.set_defaults(run_command=_verify)

    anchor = verbs.add_parser("anchor", help="write down where every chain of hashes has got to")
    anchor.add_argument("--out", type=Path, required=True, help="file to make; keep it elsewhere")
    anchor.set_defaults(run_command=_anchor)

    copy = verbs.add_parser("backup", help="copy the log of one moment into one SQLite file")
    copy.add_argument("--out", type=Path, required=True, help="file to make")
    copy.set_defaults(run_command=_backup)

    again = verbs.add_parser("restore", help="write a backup into an empty log")
    again.add_argument("--from", type=Path, required=True, dest="backup", help="file of `backup`")
    again.add_argument("--damaged", action="store_true", help="even if it is not as it was written")
    again.set_defaults(run_command=_restore)

    retain = verbs.add_parser("retain", help="remove episodes whose time to be kept is over")
    which = retain.add_mutually_exclusive_group(required=True)
    which.add_argument("--discharged-before", type=date.fromisoformat, metavar="YYYY-MM-DD")
    which.add_argument("--episode", action="append", help="this one, whatever became of it")
    retain.add_argument("--reason", default="retention", help="kept with the id")
    retain.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    retain.set_defaults(run_command=_retain)


def _migrate(a: argparse.Namespace) -> None:
    settings = Settings()
    if settings.log_url is not None:
        migrate_postgres(settings.log_url.get_secret_value(), a.grant)
    elif a.grant is not None:
        raise ValueError("--grant is for PostgreSQL: a SQLite file has no roles")
    else:
        _migrate_file(settings.log_path)
    print(f"the log has schema {SCHEMA}")


def _migrate_file(path: Path) -> None:
    path = real(path)
    lock = FileLock(path)
    try:
        with _bar() as bar:
            task = bar.add_task("writing rows anew", total=None)
            db = open_writer(path, _in_thousands(lambda n: bar.advance(task, n)))
    except BaseException:
        lock.release()
        raise
    SqliteTables(db, lock).close()


def _verify(a: argparse.Namespace) -> None:
    kept = read_anchors(a.anchors)
    with open_tables(Settings()) as tables:
        with _progress("verifying", tables) as advance:
            findings = verify(tables, kept, advance)
        with tables.snapshot():
            retired = retired_heads(tables).keys()
    for path in a.anchors:
        _say(f"compared with {path}, SHA-256 {_digest(path)}")
    if a.anchors:
        since = len((retired & kept["log"].keys()) - kept["retired"].keys())
        _say(f"{since} episodes of the anchors were retired since")
    _report(findings)


def _anchor(a: argparse.Namespace) -> None:
    with open_tables(Settings()) as tables:
        n = write_anchors(tables, a.out)
    print(f"{n} chains -> {a.out}, SHA-256 {_digest(a.out)}")


def _backup(a: argparse.Namespace) -> None:
    with open_tables(Settings()) as tables, _progress("copying", tables) as advance:
        findings = backup.back_up(tables, a.out, advance)
    _say(f"-> {a.out}, SHA-256 {_digest(a.out)}")
    _report(findings)


def _restore(a: argparse.Namespace) -> None:
    with (
        open_tables(Settings(), writes=True) as target,
        backup.opened(a.backup) as source,
        _progress("restoring", source) as advance,
    ):
        try:
            findings = backup.restore(source, target, advance, damaged=a.damaged)
        except backup.Damaged as error:
            _say("nothing was restored; --damaged restores it all the same")
            findings = error.findings
    _report(findings)


def _retain(a: argparse.Namespace) -> None:
    with open_tables(Settings(), writes=not a.dry_run) as tables:
        if a.episode is None:
            instant = datetime.combine(a.discharged_before, datetime.min.time(), UTC)
            due, unreadable = retention.discharged_before(tables, instant)
        else:
            due, unreadable = retention.with_heads(tables, a.episode), []
        if a.dry_run:
            print(f"{len(due)} episodes with {sum(due.values())} entries would be removed")
        else:
            _remove(tables, due, a.reason)
    for episode_id in unreadable:
        _say(f"left as it is, for when it ended cannot be read: {episode_id}")
    if unreadable:
        raise SystemExit(1)


def _remove(tables: Tables, due: Mapping[str, int], reason: str) -> None:
    removed: list[int] = []
    try:
        with _bar() as bar:
            task = bar.add_task("removing", total=len(due))
            for n in retention.retire(tables, due, reason):
                removed.append(n)
                bar.advance(task)
    finally:  # also if it ends before its time
        skipped = removed.count(0)
        print(f"{len(removed) - skipped} episodes with {sum(removed)} entries were removed")
        if skipped:
            print(f"{skipped} were written to meanwhile and left as they are")


def _report(findings: Sequence[Finding]) -> None:
    """Findings as JSON on the standard output, for programs; and the exit status."""
    for finding in findings:
        print(finding.to_json())
    if findings:
        _say(f"NOT as it was written: {len(findings)} findings")
        raise SystemExit(1)
    _say("as it was written")


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _in_thousands(advance: Callable[[int], None]) -> Callable[[], None]:
    """To be called for each row; a bar that is told of every single one costs more than the row."""
    rows = itertools.count(1)

    def one() -> None:
        if next(rows) % 1_000 == 0:
            advance(1_000)

    return one


@contextmanager
def _progress(what: str, tables: Tables) -> Iterator[Callable[[int], None]]:
    """Shows how many of the rows are done."""
    with _bar() as bar:
        task = bar.add_task(what, total=sum(tables.count(table) for table in CHAINED))
        yield lambda n: bar.advance(task, n)
