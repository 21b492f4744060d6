"""audit export: the audit trail as FHIR AuditEvent."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from service.commands.parsers import Commands
from service.entries import to_us
from service.log.trail_rows import audit_lines
from service.settings import Settings
from service.times import parse_time
from service.trail.fhir import audit_event


def add(commands: Commands) -> None:
    """`audit export`."""
    audit = commands.add_parser("audit", help="the audit trail: who read or wrote what")
    export = audit.add_subparsers(required=True).add_parser(
        "export", help="write it as FHIR R4 AuditEvent, one a line; the service may run"
    )
    export.add_argument("--out", type=Path, required=True, help="NDJSON file to write")
    export.add_argument("--since", type=_instant, default=None, help="from this instant on")
    export.add_argument("--until", type=_instant, default=None, help="before this instant")
    export.add_argument("--episode", help="what was done about this stay alone")
    export.add_argument("--server", default="llm4ehr", help="name of the service in the events")
    export.set_defaults(run_command=_export)


def _instant(text: str) -> int:
    """Microseconds since 1970 of an RFC 3339 time stamp. Raises ValueError."""
    return to_us(parse_time(text))


def _export(a: argparse.Namespace) -> None:
    partial = a.out.with_name(f"{a.out.name}.{os.getpid()}.partial")
    n = 0
    try:
        # It names stays and who looked at them: for nobody else's eyes.
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            for event in _events(a):
                file.write(json.dumps(event, separators=(",", ":")) + "\n")
                n += 1
        partial.rename(a.out)
    finally:
        partial.unlink(missing_ok=True)
    print(f"{n} events -> {a.out}")


def _events(a: argparse.Namespace) -> Iterator[dict[str, Any]]:
    bounds = {"since_us": a.since, "until_us": a.until}
    given = {name: value for name, value in bounds.items() if value is not None}
    for line in audit_lines(Settings(), **given):
        record = line.record
        if a.episode is not None:
            if a.episode not in record.episodes:
                continue
            # Whoever may see this stay's events may not see the others of a list.
            record = replace(record, episodes=(a.episode,))
        yield audit_event(f"{line.writer}-{line.seq}", record, a.server)
