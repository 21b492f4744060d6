"""Command line of the service. What each command does stands in `service.commands`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pydantic import ValidationError

from llm4ehr.bundle import BundleError
from llm4ehr.store import StoreError
from service import logs
from service.commands import audit, calibrate, clients, digest, log, replay, score, serve
from service.engine.backends.base import RowDependenceError
from service.log.base import LogCorrupt, LogUnavailable
from service.settings import PREFIX

_COMMANDS = (serve, audit, clients, score, calibrate, digest, replay, log)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. What a user can mend is one line, no traceback."""
    logs.configure("text")
    a = _parser().parse_args(argv)
    try:
        a.run_command(a)
    except KeyboardInterrupt:
        return 130
    except ValidationError as error:
        # The settings that are right may hold what does not belong on a terminal.
        for wrong in error.errors(include_input=False, include_url=False):
            # A name from a file of settings carries the prefix already.
            parts = (str(part).upper().removeprefix(PREFIX) for part in wrong["loc"])
            name = "".join(f"{PREFIX}{part}" for part in parts)
            print(f"error: {name} {wrong['msg']}", file=sys.stderr)
        return 1
    except (
        BundleError, StoreError, LogCorrupt, LogUnavailable, RowDependenceError, OSError, ValueError
    ) as e:  # fmt: skip
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m service", description=__doc__)
    commands = parser.add_subparsers(required=True)
    for command in _COMMANDS:
        command.add(commands)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
