"""replay: a store of stays into a running service."""

from __future__ import annotations

import argparse
from pathlib import Path

from service.commands.parsers import Commands
from service.replay import DEMO_STORE, replay


def add(commands: Commands) -> None:
    """`replay`."""
    again = commands.add_parser("replay", help="replay an episode store into a running service")
    again.add_argument("--data", type=Path, default=DEMO_STORE, help="episode store")
    again.add_argument("--url", default="http://127.0.0.1:8000")
    again.add_argument("--seconds-per-hour", type=float, default=5.0)
    again.add_argument("--head-start-hours", type=int, default=6, help="hours sent at once")
    again.add_argument("--key-file", type=Path, help="file with the API key of the client")
    again.set_defaults(run_command=_replay)


def _replay(a: argparse.Namespace) -> None:
    replay(
        a.data,
        a.url.rstrip("/"),
        seconds_per_hour=a.seconds_per_hour,
        head_start_hours=a.head_start_hours,
        key=None if a.key_file is None else a.key_file.read_text().strip(),
    )
